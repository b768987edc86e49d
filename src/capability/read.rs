//! Shapes that recur in libvirt's documents.

use crate::xml::{Cursor, ElementError};

/// A text, unless it is empty.
pub(super) fn non_empty(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

/// The `<value>` elements of an `<enum>`.
pub(super) fn read_values(cursor: &mut Cursor<'_>) -> Result<Vec<String>, ElementError> {
    let mut values = Vec::new();
    cursor.children(|cursor, child| {
        match child.name() {
            "value" => values.extend(non_empty(cursor.text()?)),
            _ => cursor.ignore_unknown(),
        }
        Ok(())
    })?;
    Ok(values)
}
