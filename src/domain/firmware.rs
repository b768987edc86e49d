//! `<os>` of a domain, as far as it chooses the firmware.

use crate::xml::{Cursor, Element, ElementError};

/// The firmware that a definition asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Firmware {
    /// `<os firmware=…>`: `efi` or `bios`; libvirt then chooses an image of the node.
    pub automatic: Option<String>,
    /// `<loader>`.
    pub loader: Option<Loader>,
    /// `<firmware><feature>`: name and `enabled`.
    pub features: Vec<(String, bool)>,
}

/// `<loader>`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Loader {
    pub path: Option<String>,
    /// `rom` or `pflash`.
    pub kind: Option<String>,
    pub secure: Option<bool>,
    pub stateless: Option<bool>,
}

impl Firmware {
    /// Reads `<loader>`.
    pub(super) fn read_loader(
        &mut self,
        cursor: &mut Cursor<'_>,
        element: &Element<'_>,
    ) -> Result<(), ElementError> {
        self.loader = Some(Loader {
            kind: element.text("type")?,
            secure: element.yes_no("secure")?,
            stateless: element.yes_no("stateless")?,
            path: cursor.non_empty_text()?,
        });
        Ok(())
    }

    /// Reads `<firmware>`.
    pub(super) fn read_features(&mut self, cursor: &mut Cursor<'_>) -> Result<(), ElementError> {
        cursor.children(|_, feature| {
            if let (Some(name), Some(enabled)) = (feature.text("name")?, feature.yes_no("enabled")?)
            {
                self.features.push((name, enabled));
            }
            Ok(())
        })
    }

    /// True if the guest boots with UEFI, chosen by libvirt or given as a flash image
    /// (`virDomainDefHasOldStyleUEFI`).
    pub fn is_uefi(&self) -> bool {
        let loader = self.loader.as_ref();
        self.automatic.as_deref() == Some("efi")
            || loader.is_some_and(|loader| loader.kind.as_deref() == Some("pflash"))
    }

    /// True if the definition enables a feature of the firmware.
    pub fn wants(&self, feature: &str) -> bool {
        let mut features = self.features.iter();
        features.any(|(name, enabled)| *enabled && name == feature)
    }

    /// True if the loader or the firmware's features ask for secure boot.
    pub fn is_secure(&self) -> bool {
        let loader = self.loader.as_ref();
        loader.is_some_and(|loader| loader.secure == Some(true)) || self.wants("secure-boot")
    }
}
