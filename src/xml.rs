//! A bounded, borrowing XML cursor whose errors carry the path of the faulty element. Pure.
//!
//! libvirt's documents are small (3 to 150 KB), but a user can supply one from anywhere, and a
//! domain's XML contains text written by tenants. [`read`] therefore rejects a document longer than
//! [`MAX_BYTES`] or nested deeper than [`MAX_DEPTH`], a document with a DTD (libvirt sends none, and
//! without one no entity can expand) and a document that is not UTF-8.
//!
//! Unknown elements are skipped and counted, because every libvirt release adds some. A known value
//! that is malformed is an error.
//!
//! The caller nests closures the way the document nests elements: [`Cursor::children`] visits the
//! children, and an error that a closure returns collects the element names on its way up.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use quick_xml::XmlVersion;
use quick_xml::events::{BytesStart, Event};
use thiserror::Error;

/// Maximum size of a document, in bytes. libvirt's largest documents have about 150 KB.
pub const MAX_BYTES: usize = 8 * 1024 * 1024;

/// Maximum nesting depth. libvirt's own documents stay below 12.
pub const MAX_DEPTH: usize = 64;

/// A malformed document, with the location of the error.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{document}: {}{problem}", Location(path))]
pub struct DocumentError {
    /// The caller's name for the document: a file name, or the kind of document.
    pub document: String,
    /// `/capabilities/guest/arch/machine/@maxCpus`; empty if the error concerns the whole document.
    pub path: String,
    pub problem: String,
}

struct Location<'p>(&'p str);

impl fmt::Display for Location<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            Ok(())
        } else {
            write!(f, "{}: ", self.0)
        }
    }
}

/// An error in the current element. Each enclosing element adds its name as the error passes
/// through it; [`read`] turns the result into a [`DocumentError`].
#[derive(Debug)]
pub struct ElementError {
    /// Element names, innermost first.
    path: Vec<String>,
    text: String,
}

impl ElementError {
    pub fn new(text: impl Into<String>) -> Self {
        Self {
            path: Vec::new(),
            text: text.into(),
        }
    }

    fn inside(mut self, name: &str) -> Self {
        self.path.push(printable(name));
        self
    }

    fn at_attribute(name: &str, text: impl Into<String>) -> Self {
        Self {
            path: vec![format!("@{name}")],
            text: text.into(),
        }
    }

    fn located(self, document: &str) -> DocumentError {
        let path = self
            .path
            .iter()
            .rev()
            .map(|name| format!("/{name}"))
            .collect();
        DocumentError {
            document: document.to_owned(),
            path,
            problem: self.text,
        }
    }
}

/// Parses a document whose root element has one of the names in `roots`.
///
/// `document` names the document in errors. `read` receives the cursor positioned inside the root.
///
/// # Errors
/// A document that is too long, too deep, not UTF-8 or not well-formed, that has a DTD or another
/// root, and any error of `read`.
pub fn read<T>(
    document: &str,
    bytes: &[u8],
    roots: &[&str],
    read: impl FnOnce(&mut Cursor<'_>, &Element<'_>) -> Result<T, ElementError>,
) -> Result<T, DocumentError> {
    read_root(bytes, roots, read).map_err(|problem| problem.located(document))
}

fn read_root<T>(
    bytes: &[u8],
    roots: &[&str],
    read: impl FnOnce(&mut Cursor<'_>, &Element<'_>) -> Result<T, ElementError>,
) -> Result<T, ElementError> {
    if bytes.len() > MAX_BYTES {
        return Err(ElementError::new(format!(
            "is larger than {} MiB",
            MAX_BYTES / 1024 / 1024
        )));
    }
    let text = std::str::from_utf8(bytes).map_err(|error| {
        ElementError::new(format!("is not UTF-8 after byte {}", error.valid_up_to()))
    })?;
    let mut cursor = Cursor::new(text);
    let root = match cursor.next()? {
        Token::Start(root) if roots.contains(&root.name()) => root,
        Token::Start(root) => {
            let expected = roots.join("> or <");
            let got = printable(root.name());
            return Err(ElementError::new(format!(
                "the root is <{got}>, expected <{expected}>"
            )));
        }
        Token::End | Token::Eof => {
            return Err(ElementError::new("is empty: it has no root element"));
        }
        Token::Text(_) => {
            return Err(ElementError::new(
                "is not an XML document: it begins with text",
            ));
        }
    };
    let facts = read(&mut cursor, &root)
        .and_then(|facts| cursor.finish(0).map(|()| facts))
        .map_err(|problem| problem.inside(root.name()))?;
    match cursor.next()? {
        Token::Eof => Ok(facts),
        _ => Err(ElementError::new(
            "has content after the end of its root element",
        )),
    }
}

/// A position in a document, just after a start tag.
pub struct Cursor<'x> {
    reader: quick_xml::Reader<&'x [u8]>,
    depth: usize,
    /// True after an empty element `<e/>` whose end has not been reported yet.
    end_pending: bool,
    /// True inside content that is skipped, whose depth is unlimited.
    is_skipping: bool,
    unknown_elements: usize,
}

enum Token<'x> {
    Start(Element<'x>),
    End,
    Text(Cow<'x, str>),
    Eof,
}

impl<'x> Cursor<'x> {
    fn new(text: &'x str) -> Self {
        let mut cursor = Self {
            reader: quick_xml::Reader::from_str(text),
            depth: 0,
            end_pending: false,
            is_skipping: false,
            unknown_elements: 0,
        };
        cursor.keep_whitespace(false);
        cursor
    }

    /// Outside of text elements, whitespace is only indentation.
    fn keep_whitespace(&mut self, keep: bool) {
        self.reader.config_mut().trim_text_start = !keep;
    }

    /// Calls `each` for every child of the current element, up to its end tag. Content of a child
    /// that `each` does not read is skipped.
    pub fn children(
        &mut self,
        mut each: impl FnMut(&mut Self, &Element<'x>) -> Result<(), ElementError>,
    ) -> Result<(), ElementError> {
        let depth = self.depth;
        loop {
            match self.next()? {
                Token::Start(child) => each(self, &child)
                    .and_then(|()| self.finish(depth))
                    .map_err(|problem| problem.inside(child.name()))?,
                Token::End => return Ok(()),
                Token::Text(_) => {}
                Token::Eof => return Err(ElementError::new("ends too early")),
            }
        }
    }

    /// Reads the children of the current element into `value`, as [`Cursor::children`] does.
    pub fn fill<T>(
        &mut self,
        mut value: T,
        mut each: impl FnMut(&mut Self, &Element<'x>, &mut T) -> Result<(), ElementError>,
    ) -> Result<T, ElementError> {
        self.children(|cursor, child| each(cursor, child, &mut value))?;
        Ok(value)
    }

    /// Returns the texts of all children with this name, without empty ones. Other children count
    /// as unknown.
    pub fn texts_of(&mut self, name: &str) -> Result<Vec<String>, ElementError> {
        self.fill(Vec::new(), |cursor, child, texts| {
            if child.name() == name {
                texts.extend(cursor.non_empty_text()?);
            } else {
                cursor.ignore_unknown();
            }
            Ok(())
        })
    }

    /// Returns the trimmed text of the current element, without the text of its children.
    pub fn text(&mut self) -> Result<String, ElementError> {
        self.keep_whitespace(true);
        let text = self.whole_text();
        self.keep_whitespace(false);
        Ok(text?.trim().to_owned())
    }

    /// Returns [`Cursor::text`], or `None` if it is empty.
    pub fn non_empty_text(&mut self) -> Result<Option<String>, ElementError> {
        Ok(Some(self.text()?).filter(|text| !text.is_empty()))
    }

    fn whole_text(&mut self) -> Result<Cow<'x, str>, ElementError> {
        let depth = self.depth;
        let mut text: Cow<'x, str> = Cow::Borrowed("");
        loop {
            match self.next()? {
                Token::Text(part) if text.is_empty() => text = part,
                Token::Text(part) => text.to_mut().push_str(&part),
                Token::Start(_) => self.finish(depth)?,
                Token::End => return Ok(text),
                Token::Eof => return Err(ElementError::new("ends too early")),
            }
        }
    }

    /// Parses the text of the current element; `what` names the expected value in the error.
    pub fn parsed<T: FromStr>(&mut self, what: &str) -> Result<T, ElementError> {
        let text = self.text()?;
        text.parse()
            .map_err(|_| ElementError::new(format!("'{}' is not a valid {what}", printable(&text))))
    }

    /// Counts an unknown child. [`Cursor::children`] skips the child in any case.
    pub fn ignore_unknown(&mut self) {
        self.unknown_elements += 1;
    }

    /// Number of calls to [`Cursor::ignore_unknown`] so far.
    pub fn unknown_elements(&self) -> usize {
        self.unknown_elements
    }

    /// Skips the rest of the current element without a limit on its depth, for content of other
    /// XML namespaces.
    pub fn skip(&mut self) -> Result<(), ElementError> {
        self.is_skipping = true;
        let outcome = self.finish(self.depth - 1);
        self.is_skipping = false;
        outcome
    }

    /// Skips content until `depth` elements are open.
    fn finish(&mut self, depth: usize) -> Result<(), ElementError> {
        while self.depth > depth {
            if let Token::Eof = self.next()? {
                return Err(ElementError::new("ends too early"));
            }
        }
        Ok(())
    }

    fn next(&mut self) -> Result<Token<'x>, ElementError> {
        if std::mem::take(&mut self.end_pending) {
            self.depth -= 1;
            return Ok(Token::End);
        }
        loop {
            let event = self.reader.read_event().map_err(|error| {
                let at = self.reader.error_position();
                ElementError::new(format!("is not well-formed at byte {at}: {error}"))
            })?;
            match event {
                Event::Start(start) => return self.enter(start),
                Event::Empty(start) => {
                    self.end_pending = true;
                    return self.enter(start);
                }
                Event::End(_) => {
                    self.depth -= 1;
                    return Ok(Token::End);
                }
                Event::Text(text) => return Ok(Token::Text(text.into_inner())),
                Event::CData(data) => return Ok(Token::Text(data.into_inner())),
                Event::GeneralRef(reference) => {
                    return Ok(Token::Text(resolve(&reference)?.into()));
                }
                Event::DocType(_) => {
                    return Err(ElementError::new("has a DTD, which libvirt never sends"));
                }
                Event::Eof if self.depth > 0 => return Err(ElementError::new("ends too early")),
                Event::Eof => return Ok(Token::Eof),
                Event::Comment(_) | Event::Decl(_) | Event::PI(_) => {}
            }
        }
    }

    fn enter(&mut self, start: BytesStart<'x>) -> Result<Token<'x>, ElementError> {
        if self.depth >= MAX_DEPTH && !self.is_skipping {
            return Err(ElementError::new(format!(
                "is nested deeper than {MAX_DEPTH} elements"
            )));
        }
        self.depth += 1;
        Ok(Token::Start(Element { start }))
    }
}

fn resolve(reference: &quick_xml::events::BytesRef<'_>) -> Result<String, ElementError> {
    let bad = || ElementError::new("has an entity that is not one of XML's own");
    if let Some(character) = reference.resolve_char_ref().map_err(|_| bad())? {
        return Ok(character.to_string());
    }
    quick_xml::escape::resolve_predefined_entity(&reference.xml10_content())
        .map(str::to_owned)
        .ok_or_else(bad)
}

/// A start tag.
pub struct Element<'x> {
    start: BytesStart<'x>,
}

impl Element<'_> {
    pub fn name(&self) -> &str {
        self.start.name().0
    }

    /// Returns an attribute's value with entities resolved, or `None` if the attribute is absent.
    pub fn attribute(&self, name: &str) -> Result<Option<Cow<'_, str>>, ElementError> {
        for attribute in self.start.attributes().with_checks(false) {
            let attribute = attribute.map_err(|error| {
                ElementError::new(format!("has a malformed attribute: {error}"))
            })?;
            if attribute.key.0 == name {
                return attribute
                    .normalized_value(XmlVersion::Implicit1_0)
                    .map(Some)
                    .map_err(|error| ElementError::at_attribute(name, error.to_string()));
            }
        }
        Ok(None)
    }

    /// Returns an attribute's value as an owned string.
    pub fn text(&self, name: &str) -> Result<Option<String>, ElementError> {
        Ok(self.attribute(name)?.map(Cow::into_owned))
    }

    /// Returns an attribute's value, or `None` if it is absent or empty.
    pub fn non_empty(&self, name: &str) -> Result<Option<String>, ElementError> {
        Ok(self.text(name)?.filter(|value| !value.is_empty()))
    }

    /// Parses an attribute's value; `what` names the expected value in the error.
    pub fn parsed<T: FromStr>(&self, name: &str, what: &str) -> Result<Option<T>, ElementError> {
        let Some(value) = self.attribute(name)? else {
            return Ok(None);
        };
        value.trim().parse().map(Some).map_err(|_| {
            ElementError::at_attribute(
                name,
                format!("'{}' is not a valid {what}", printable(&value)),
            )
        })
    }

    /// Parses an attribute whose value is `yes` or `no` (or `on` or `off`).
    pub fn yes_no(&self, name: &str) -> Result<Option<bool>, ElementError> {
        match self.attribute(name)?.as_deref() {
            None => Ok(None),
            Some("yes" | "on") => Ok(Some(true)),
            Some("no" | "off") => Ok(Some(false)),
            Some(other) => Err(ElementError::at_attribute(
                name,
                format!("'{}' is neither 'yes' nor 'no'", printable(other)),
            )),
        }
    }
}

/// Shortens and escapes text from a document, so that it is safe in an error or a log line.
fn printable(text: &str) -> String {
    const MAX_CHARS: usize = 60;
    let mut shown: String = text
        .chars()
        .take(MAX_CHARS)
        .flat_map(char::escape_debug)
        .collect();
    if text.chars().nth(MAX_CHARS).is_some() {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the names of the root's children, with the value in place of the name for known ones.
    fn walk(text: impl AsRef<[u8]>) -> Result<Vec<String>, DocumentError> {
        read("doc.xml", text.as_ref(), &["r"], |cursor, _| {
            cursor.fill(Vec::new(), |cursor, child, seen| {
                seen.push(match child.name() {
                    "t" => cursor.text()?,
                    "n" => child
                        .parsed::<u32>("max", "number")?
                        .unwrap_or(0)
                        .to_string(),
                    "b" => child.yes_no("on")?.unwrap_or(false).to_string(),
                    name => name.to_owned(),
                });
                Ok(())
            })
        })
    }

    fn error(text: impl AsRef<[u8]>) -> String {
        walk(text).unwrap_err().to_string()
    }

    #[test]
    fn unread_content_of_a_child_is_skipped() {
        let text = "<?xml version='1.0'?><!-- c --><r> <a><t>inner</t></a> <t> x </t><e/>\n</r>\n";
        assert_eq!(walk(text).unwrap(), ["a", "x", "e"]);
    }

    #[test]
    fn text_spans_entities_cdata_and_children() {
        let text = "<r><t>a&amp; &amp;b&#x41;<u>no <v/></u> <![CDATA[<c>]]> </t></r>";
        assert_eq!(walk(text).unwrap(), ["a& &bA <c>"]);
    }

    #[test]
    fn malformed_value_yields_error_with_document_and_path() {
        assert_eq!(
            error("<r><n max='x'/></r>"),
            "doc.xml: /r/n/@max: 'x' is not a valid number"
        );
        assert_eq!(
            error("<r><n max='-1'/></r>"),
            "doc.xml: /r/n/@max: '-1' is not a valid number"
        );
        assert_eq!(
            error("<r><b on='maybe'/></r>"),
            "doc.xml: /r/b/@on: 'maybe' is neither 'yes' nor 'no'"
        );
        let broken = walk("<r><a></b></r>").unwrap_err();
        assert_eq!(broken.path, "/r/a");
        assert!(
            broken.problem.starts_with("is not well-formed at byte"),
            "{broken}"
        );
    }

    #[test]
    fn each_kind_of_malformed_document_has_its_own_error() {
        assert_eq!(error(""), "doc.xml: is empty: it has no root element");
        assert_eq!(error("  \n"), "doc.xml: is empty: it has no root element");
        assert_eq!(
            error("hello"),
            "doc.xml: is not an XML document: it begins with text"
        );
        assert_eq!(error("<x/>"), "doc.xml: the root is <x>, expected <r>");
        assert_eq!(error("<r><a>"), "doc.xml: /r/a: ends too early");
        assert_eq!(
            error("<r/><r/>"),
            "doc.xml: has content after the end of its root element"
        );
        assert_eq!(error([b'<', 0xff]), "doc.xml: is not UTF-8 after byte 1");
        assert_eq!(
            error("<!DOCTYPE r [<!ENTITY a 'b'>]><r/>"),
            "doc.xml: has a DTD, which libvirt never sends"
        );
        assert_eq!(
            error("<r><t>&lol;</t></r>"),
            "doc.xml: /r/t: has an entity that is not one of XML's own"
        );
    }

    #[test]
    fn too_deep_or_too_large_document_is_rejected() {
        let deep = format!("<r>{}{}</r>", "<a>".repeat(100), "</a>".repeat(100));
        assert!(error(deep).ends_with("is nested deeper than 64 elements"));
        assert_eq!(
            error(vec![b' '; MAX_BYTES + 1]),
            "doc.xml: is larger than 8 MiB"
        );
    }
}
