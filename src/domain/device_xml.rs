//! Writes device XML for libvirt from typed values.

use quick_xml::escape::escape;

use crate::units::{Bytes, KiB};

/// Returns the XML of a DIMM to attach.
pub fn dimm(alias: &str, size: KiB, node: Option<u32>) -> String {
    let node = node.map_or(String::new(), |node| format!("<node>{node}</node>"));
    format!(
        "<memory model='dimm'><target><size unit='KiB'>{}</size>{node}</target><alias \
         name='{}'/></memory>",
        kib(size),
        escape(alias)
    )
}

fn kib(size: KiB) -> u64 {
    Bytes::from(size).get() / 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dimm_with_special_characters_in_alias_is_escaped() {
        assert_eq!(
            dimm("ua-'<&", KiB::new(262_144).unwrap(), Some(0)),
            "<memory model='dimm'><target><size \
             unit='KiB'>262144</size><node>0</node></target><alias \
             name='ua-&apos;&lt;&amp;'/></memory>"
        );
    }
}
