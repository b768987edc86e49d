//! A definition as a tree, from which the copies for libvirt are made.

use quick_xml::events::{BytesEnd, BytesStart, BytesText, Event};
use quick_xml::{Reader, Writer, XmlVersion};

use crate::xml::MAX_DEPTH;

/// An element with its content.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Tree {
    pub(super) name: String,
    attributes: Vec<(String, String)>,
    children: Vec<Node>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Node {
    Element(Tree),
    Text(String),
}

impl Tree {
    /// Parses a document without `<metadata>` and without elements and declarations of other
    /// namespaces. Returns `None` if it is not well-formed, which [`super::Requirement::parse`]
    /// reports in detail.
    pub(super) fn parse(document: &str) -> Option<Self> {
        let mut reader = Reader::from_str(document);
        // The bottom holds the root.
        let mut open = vec![Self::default()];
        let mut skipped = 0_usize;
        loop {
            match reader.read_event().ok()? {
                Event::Start(start) => {
                    if skipped > 0 || is_foreign(start.name().0) {
                        skipped += 1;
                        continue;
                    }
                    if open.len() > MAX_DEPTH {
                        return None;
                    }
                    open.push(Self::read(&start)?);
                }
                Event::Empty(start) if skipped == 0 && !is_foreign(start.name().0) => {
                    open.last_mut()?.push(Self::read(&start)?);
                }
                Event::End(_) if skipped > 0 => skipped -= 1,
                Event::End(_) => {
                    let element = open.pop()?;
                    open.last_mut()?.push(element);
                }
                Event::Text(text) if skipped == 0 => {
                    open.last_mut()?.push_content(&text.into_inner());
                }
                Event::CData(data) if skipped == 0 => {
                    open.last_mut()?.push_text(&data.into_inner());
                }
                Event::GeneralRef(reference) if skipped == 0 => {
                    let text = match reference.resolve_char_ref().ok()? {
                        Some(character) => character.to_string(),
                        None => {
                            let name = reference.xml10_content();
                            quick_xml::escape::resolve_predefined_entity(&name)?.to_owned()
                        }
                    };
                    open.last_mut()?.push_text(&text);
                }
                Event::Eof => break,
                _ => {}
            }
        }
        let [bottom] = <[Self; 1]>::try_from(open).ok()?;
        bottom.children.into_iter().find_map(|node| match node {
            Node::Element(root) => Some(root),
            Node::Text(_) => None,
        })
    }

    fn read(start: &BytesStart<'_>) -> Option<Self> {
        let mut element = Self::new(start.name().0);
        for attribute in start.attributes().with_checks(false) {
            let attribute = attribute.ok()?;
            let name = attribute.key.0;
            if !name.contains(':') && name != "xmlns" {
                let value = attribute.normalized_value(XmlVersion::Implicit1_0).ok()?;
                element.set(name, value.as_ref());
            }
        }
        Some(element)
    }

    pub(super) fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            ..Self::default()
        }
    }

    /// Returns the element with an attribute.
    pub(super) fn with(mut self, name: &str, value: &str) -> Self {
        self.set(name, value);
        self
    }

    /// Returns the element with a text.
    pub(super) fn with_text(mut self, text: &str) -> Self {
        self.push_text(text);
        self
    }

    /// Returns the element with a child, if there is one.
    pub(super) fn with_child(mut self, child: impl Into<Option<Self>>) -> Self {
        self.children.extend(child.into().map(Node::Element));
        self
    }

    pub(super) fn attribute(&self, name: &str) -> Option<&str> {
        let mut attributes = self.attributes.iter();
        let (_, value) = attributes.find(|(own, _)| own == name)?;
        Some(value)
    }

    /// True if an attribute has this value.
    pub(super) fn has(&self, name: &str, value: &str) -> bool {
        self.attribute(name) == Some(value)
    }

    pub(super) fn set(&mut self, name: &str, value: &str) {
        self.remove_attribute(name);
        self.attributes.push((name.to_owned(), value.to_owned()));
    }

    /// Removes an attribute and returns true if it existed.
    pub(super) fn remove_attribute(&mut self, name: &str) -> bool {
        let before = self.attributes.len();
        self.attributes.retain(|(own, _)| own != name);
        self.attributes.len() < before
    }

    /// Removes all attributes but these.
    pub(super) fn keep_attributes(&mut self, names: &[&str]) {
        self.attributes
            .retain(|(name, _)| names.contains(&name.as_str()));
    }

    pub(super) fn elements(&self) -> impl Iterator<Item = &Self> {
        self.children.iter().filter_map(|node| match node {
            Node::Element(element) => Some(element),
            Node::Text(_) => None,
        })
    }

    pub(super) fn elements_mut(&mut self) -> impl Iterator<Item = &mut Self> {
        self.children.iter_mut().filter_map(|node| match node {
            Node::Element(element) => Some(element),
            Node::Text(_) => None,
        })
    }

    pub(super) fn child(&self, name: &str) -> Option<&Self> {
        self.elements().find(|child| child.name == name)
    }

    pub(super) fn child_mut(&mut self, name: &str) -> Option<&mut Self> {
        self.elements_mut().find(|child| child.name == name)
    }

    /// Returns the text, without that of the children.
    pub(super) fn text(&self) -> String {
        let texts = self.children.iter().filter_map(|node| match node {
            Node::Text(text) => Some(text.as_str()),
            Node::Element(_) => None,
        });
        texts.collect::<String>().trim().to_owned()
    }

    pub(super) fn push(&mut self, element: Self) {
        self.children.push(Node::Element(element));
    }

    pub(super) fn push_front(&mut self, element: Self) {
        self.children.insert(0, Node::Element(element));
    }

    /// Adds text, unless it is the indentation between elements.
    fn push_content(&mut self, text: &str) {
        let continues = matches!(self.children.last(), Some(Node::Text(_)));
        if continues || !text.trim().is_empty() {
            self.push_text(text);
        }
    }

    fn push_text(&mut self, text: &str) {
        self.children.push(Node::Text(text.to_owned()));
    }

    /// Removes the children that `keep` rejects.
    pub(super) fn retain(&mut self, mut keep: impl FnMut(&Self) -> bool) {
        self.children.retain(|node| match node {
            Node::Element(element) => keep(element),
            Node::Text(_) => true,
        });
    }

    /// Removes the children with this name and returns true if there were any.
    pub(super) fn remove(&mut self, name: &str) -> bool {
        let before = self.children.len();
        self.retain(|child| child.name != name);
        self.children.len() < before
    }

    /// Calls `each` for this element and all below it.
    pub(super) fn for_each(&self, each: &mut impl FnMut(&Self)) {
        each(self);
        self.elements().for_each(|child| child.for_each(each));
    }

    pub(super) fn for_each_mut(&mut self, each: &mut impl FnMut(&mut Self)) {
        each(self);
        self.elements_mut()
            .for_each(|child| child.for_each_mut(each));
    }

    pub(super) fn to_xml(&self) -> Option<String> {
        let mut writer = Writer::new(Vec::new());
        self.write(&mut writer)?;
        String::from_utf8(writer.into_inner()).ok()
    }

    fn write(&self, writer: &mut Writer<Vec<u8>>) -> Option<()> {
        let mut start = BytesStart::new(self.name.as_str());
        for (name, value) in &self.attributes {
            start.push_attribute((name.as_str(), value.as_str()));
        }
        if self.children.is_empty() {
            return writer.write_event(Event::Empty(start)).ok();
        }
        writer.write_event(Event::Start(start)).ok()?;
        for node in &self.children {
            match node {
                Node::Element(element) => element.write(writer)?,
                Node::Text(text) => writer.write_event(Event::Text(BytesText::new(text))).ok()?,
            }
        }
        let end = BytesEnd::new(self.name.as_str());
        writer.write_event(Event::End(end)).ok()
    }
}

/// True for elements that libvirt does not interpret (`<metadata>`), or passes to QEMU without
/// interpreting them (`<qemu:commandline>`).
fn is_foreign(name: &str) -> bool {
    name == "metadata" || name.contains(':')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_attributes_and_entities_survive() {
        let xml = "<a x=\"1 &lt; 2\"><b>3 &amp; &#52;<![CDATA[<5>]]></b><c/></a>";
        let tree = Tree::parse(xml).unwrap();
        assert_eq!(tree.attribute("x"), Some("1 < 2"));
        assert_eq!(tree.child("b").unwrap().text(), "3 & 4<5>");
        let again = Tree::parse(&tree.to_xml().unwrap()).unwrap();
        assert_eq!(again.child("b").unwrap().text(), "3 & 4<5>");
    }

    #[test]
    fn metadata_and_other_namespaces_are_left_out() {
        let deep = "<d>".repeat(200) + &"</d>".repeat(200);
        let xml = format!(
            "<domain xmlns:qemu='q'><metadata>{deep}</metadata><qemu:commandline><qemu:arg \
             value='-evil'/></qemu:commandline><vcpu>1</vcpu></domain>"
        );
        let tree = Tree::parse(&xml).unwrap();
        assert_eq!(tree.to_xml().unwrap(), "<domain><vcpu>1</vcpu></domain>");
        assert_eq!(Tree::parse(&deep), None);
    }

    #[test]
    fn malformed_document_yields_none() {
        for xml in ["", "<domain><a", "<domain>", "<a></b>"] {
            assert_eq!(Tree::parse(xml), None, "{xml}");
        }
    }
}
