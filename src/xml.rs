//! Walking over libvirt's XML: bounded, borrowed, and with a path in every error. Pure.
//!
//! libvirt's documents are small (3 to 150 KB), but they can come from anywhere and, for domains,
//! hold tenants' text. So a document is at most [`MAX_BYTES`] long and [`MAX_DEPTH`] deep, has no
//! DTD (libvirt sends none, and with it go entity tricks) and is UTF-8. What a reader does not ask
//! for is passed over and counted: newer libvirts add elements with every release.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use quick_xml::XmlVersion;
use quick_xml::events::{BytesStart, Event};
use thiserror::Error;

/// The longest document that is read.
pub const MAX_BYTES: usize = 8 * 1024 * 1024;

/// The deepest nesting that is read; libvirt's own documents stay below 12.
pub const MAX_DEPTH: usize = 64;

/// A document that cannot be read, and where it goes wrong.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{document}: {}{problem}", Location(path))]
pub struct DocumentError {
    /// What the caller calls the document: a file's name, or which answer of libvirt it is.
    pub document: String,
    /// The element or attribute, `/capabilities/guest/arch/machine/@maxCpus`; empty for the
    /// document as a whole.
    pub path: String,
    /// What is wrong, as the rest of a sentence.
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

/// What is wrong, with the path as far as it is known on the way up.
#[derive(Debug)]
pub struct ElementError {
    /// Names from the innermost outwards.
    path: Vec<String>,
    text: String,
}

impl ElementError {
    /// A problem with the element that is being read.
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

/// Reads a document whose root has one of the names in `roots`.
///
/// `document` is what the document is called in errors. `read` gets the cursor inside the root.
///
/// # Errors
/// What [`DocumentError`] says: too long, too deep, a DTD, not UTF-8, not well-formed, another root,
/// or what `read` itself found.
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
        Token::Text(_) => return Err(ElementError::new("is no XML document: it begins with text")),
    };
    let facts = read(&mut cursor, &root)
        .and_then(|facts| cursor.finish(0).map(|()| facts))
        .map_err(|problem| problem.inside(root.name()))?;
    match cursor.next()? {
        Token::Eof => Ok(facts),
        _ => Err(ElementError::new(
            "has something after the end of its root element",
        )),
    }
}

/// A place in a document, just behind a start tag.
pub struct Cursor<'x> {
    reader: quick_xml::Reader<&'x [u8]>,
    depth: usize,
    /// Behind an element without content, `<e/>`, whose end is still to be told.
    ends_at_once: bool,
    /// Inside content of which nothing is read, and whose depth is not bounded.
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
            ends_at_once: false,
            is_skipping: false,
            unknown_elements: 0,
        };
        cursor.heed_space(false);
        cursor
    }

    /// Whether white space is text. Between elements it only makes them easy to read.
    fn heed_space(&mut self, heed: bool) {
        self.reader.config_mut().trim_text_start = !heed;
    }

    /// Calls `each` for every child of the present element, up to its end tag. What `each` leaves
    /// unread of a child is passed over.
    ///
    /// # Errors
    /// The first problem in the document or of `each`.
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

    /// The trimmed text of the present element, up to its end tag, without that of children.
    ///
    /// # Errors
    /// The first problem in the document.
    pub fn text(&mut self) -> Result<String, ElementError> {
        self.heed_space(true);
        let text = self.whole_text();
        self.heed_space(false);
        Ok(text?.trim().to_owned())
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

    /// The text of the present element as a number or another type with a spelling.
    ///
    /// # Errors
    /// A text that does not spell a `T`, or a problem in the document.
    pub fn parsed<T: FromStr>(&mut self, what: &str) -> Result<T, ElementError> {
        let text = self.text()?;
        text.parse()
            .map_err(|_| ElementError::new(format!("'{}' is no {what}", printable(&text))))
    }

    /// Notes that a child is of no known kind. It is passed over like every child that is not
    /// read; this only counts it.
    pub fn ignore_unknown(&mut self) {
        self.unknown_elements += 1;
    }

    /// How many children were of no known kind so far.
    pub fn unknown_elements(&self) -> usize {
        self.unknown_elements
    }

    /// Skips the rest of the present element without counting its depth against [`MAX_DEPTH`]: for
    /// content of others, which may nest as deeply as they like.
    ///
    /// # Errors
    /// The first problem in the document.
    pub fn skip(&mut self) -> Result<(), ElementError> {
        self.is_skipping = true;
        let outcome = self.finish(self.depth - 1);
        self.is_skipping = false;
        outcome
    }

    /// Reads on until `depth` elements are open.
    fn finish(&mut self, depth: usize) -> Result<(), ElementError> {
        while self.depth > depth {
            if let Token::Eof = self.next()? {
                return Err(ElementError::new("ends too early"));
            }
        }
        Ok(())
    }

    fn next(&mut self) -> Result<Token<'x>, ElementError> {
        if std::mem::take(&mut self.ends_at_once) {
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
                    self.ends_at_once = true;
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
    /// The element's name.
    pub fn name(&self) -> &str {
        self.start.name().0
    }

    /// An attribute's value with its entities resolved; `None` if it is not there.
    ///
    /// # Errors
    /// Attributes that are not well-formed.
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

    /// An attribute's value as an owned text.
    ///
    /// # Errors
    /// As [`Element::attribute`].
    pub fn text(&self, name: &str) -> Result<Option<String>, ElementError> {
        Ok(self.attribute(name)?.map(Cow::into_owned))
    }

    /// An attribute's value as a number or another type with a spelling; `what` names it in the
    /// error.
    ///
    /// # Errors
    /// As [`Element::attribute`], and a value that does not spell a `T`.
    pub fn parsed<T: FromStr>(&self, name: &str, what: &str) -> Result<Option<T>, ElementError> {
        let Some(value) = self.attribute(name)? else {
            return Ok(None);
        };
        value.trim().parse().map(Some).map_err(|_| {
            ElementError::at_attribute(name, format!("'{}' is no {what}", printable(&value)))
        })
    }

    /// An attribute whose value is `yes` or `no` (or `on` or `off`).
    ///
    /// # Errors
    /// As [`Element::attribute`], and any other value.
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

/// A text from a document, short and without control characters, for an error or a log line.
fn printable(text: &str) -> String {
    const LONGEST: usize = 60;
    let mut shown: String = text
        .chars()
        .take(LONGEST)
        .flat_map(char::escape_debug)
        .collect();
    if text.chars().nth(LONGEST).is_some() {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The names of the root's children and the texts of those called `t`.
    fn walk(text: impl AsRef<[u8]>) -> Result<Vec<String>, DocumentError> {
        read("doc.xml", text.as_ref(), &["r"], |cursor, _| {
            let mut seen = Vec::new();
            cursor.children(|cursor, child| {
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
            })?;
            Ok(seen)
        })
    }

    fn error(text: impl AsRef<[u8]>) -> String {
        walk(text).unwrap_err().to_string()
    }

    #[test]
    fn children_are_visited_and_what_is_not_read_is_passed_over() {
        let text = "<?xml version='1.0'?><!-- c --><r> <a><t>inner</t></a> <t> x </t><e/>\n</r>\n";
        assert_eq!(walk(text).unwrap(), ["a", "x", "e"]);
    }

    #[test]
    fn text_is_joined_over_entities_cdata_and_children() {
        let text = "<r><t>a&amp; &amp;b&#x41;<u>no <v/></u> <![CDATA[<c>]]> </t></r>";
        assert_eq!(walk(text).unwrap(), ["a& &bA <c>"]);
    }

    #[test]
    fn an_error_names_the_document_and_the_path() {
        assert_eq!(
            error("<r><n max='x'/></r>"),
            "doc.xml: /r/n/@max: 'x' is no number"
        );
        assert_eq!(
            error("<r><n max='-1'/></r>"),
            "doc.xml: /r/n/@max: '-1' is no number"
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
    fn what_is_no_document_is_told_apart() {
        assert_eq!(error(""), "doc.xml: is empty: it has no root element");
        assert_eq!(error("  \n"), "doc.xml: is empty: it has no root element");
        assert_eq!(
            error("hello"),
            "doc.xml: is no XML document: it begins with text"
        );
        assert_eq!(error("<x/>"), "doc.xml: the root is <x>, expected <r>");
        assert_eq!(error("<r><a>"), "doc.xml: /r/a: ends too early");
        assert_eq!(
            error("<r/><r/>"),
            "doc.xml: has something after the end of its root element"
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
    fn bounds_hold() {
        let deep = format!("<r>{}{}</r>", "<a>".repeat(100), "</a>".repeat(100));
        assert!(error(deep).ends_with("is nested deeper than 64 elements"));
        assert_eq!(
            error(vec![b' '; MAX_BYTES + 1]),
            "doc.xml: is larger than 8 MiB"
        );
    }
}
