//! Reads the fields that the rules use from an object, and skips the rest.

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use shardmill_sdk::Error;

use crate::condition::Number;

/// The fields that the rules use, as a tree of their paths.
#[derive(Default)]
pub(crate) struct FieldTree {
    root: Node,
    count: usize,
}

#[derive(Default)]
struct Node {
    /// Index of the value in [`Fields`], if a rule uses it.
    slot: Option<usize>,
    children: Vec<(String, Node)>,
}

impl FieldTree {
    /// Adds a field, and returns its index in [`Fields`].
    pub(crate) fn add(&mut self, path: &str) -> Result<usize, Error> {
        let mut node = &mut self.root;
        for name in path.split('.') {
            if name.is_empty() {
                return Err(Error::reject(format_args!("field: `{path}` has an empty name in it")));
            }
            let index = node.children.iter().position(|(child, _)| child == name);
            let index = index.unwrap_or_else(|| {
                node.children.push((name.to_owned(), Node::default()));
                node.children.len() - 1
            });
            node = &mut node.children[index].1;
        }
        let count = &mut self.count;
        Ok(*node.slot.get_or_insert_with(|| {
            *count += 1;
            *count - 1
        }))
    }
}

/// Values of the used fields in an object.
pub(crate) struct Fields<'a>(Vec<Found<'a>>);

/// Value at a path.
#[derive(Clone)]
pub(crate) enum Found<'a> {
    /// Absent or null.
    Nothing,
    Bool(bool),
    Number(Number),
    Text(Cow<'a, str>),
    /// An array or an object.
    Nested,
}

impl<'a> Fields<'a> {
    pub(crate) fn read(tree: &FieldTree, json: &'a str) -> Result<Self, serde_json::Error> {
        let mut fields = Self(vec![Found::Nothing; tree.count]);
        let mut deserializer = serde_json::Deserializer::from_str(json);
        deserializer.deserialize_map(Reader { node: &tree.root, fields: &mut fields })?;
        deserializer.end()?;
        Ok(fields)
    }

    pub(crate) fn get(&self, slot: usize) -> &Found<'a> {
        &self.0[slot]
    }
}

/// Reads one value of the object, and the values below it.
struct Reader<'t, 'f, 'a> {
    node: &'t Node,
    fields: &'f mut Fields<'a>,
}

impl<'a> Reader<'_, '_, 'a> {
    fn found(self, found: Found<'a>) {
        if let Some(slot) = self.node.slot {
            self.fields.0[slot] = found;
        }
    }
}

impl<'de> DeserializeSeed<'de> for Reader<'_, '_, 'de> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Reader<'_, '_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key_seed(KeyOf(self.node))? {
            match key {
                Some(node) => map.next_value_seed(Reader { node, fields: self.fields })?,
                None => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        self.found(Found::Nested);
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        self.found(Found::Nested);
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        self.found(Found::Nothing);
        Ok(())
    }

    fn visit_bool<E>(self, value: bool) -> Result<(), E> {
        self.found(Found::Bool(value));
        Ok(())
    }

    fn visit_i64<E>(self, value: i64) -> Result<(), E> {
        self.found(Found::Number(Number::Integer(value.into())));
        Ok(())
    }

    fn visit_u64<E>(self, value: u64) -> Result<(), E> {
        self.found(Found::Number(Number::Integer(value.into())));
        Ok(())
    }

    fn visit_f64<E>(self, value: f64) -> Result<(), E> {
        self.found(Found::Number(Number::Double(value)));
        Ok(())
    }

    fn visit_borrowed_str<E>(self, value: &'de str) -> Result<(), E> {
        self.found(Found::Text(Cow::Borrowed(value)));
        Ok(())
    }

    fn visit_str<E>(self, value: &str) -> Result<(), E> {
        self.found(Found::Text(Cow::Owned(value.to_owned())));
        Ok(())
    }
}

/// Reads a key and finds its node, if a rule uses it or something below it.
struct KeyOf<'t>(&'t Node);

impl<'de, 't> DeserializeSeed<'de> for KeyOf<'t> {
    type Value = Option<&'t Node>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'t> Visitor<'_> for KeyOf<'t> {
    type Value = Option<&'t Node>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E>(self, key: &str) -> Result<Self::Value, E> {
        Ok(self.0.children.iter().find(|(name, _)| name == key).map(|(_, node)| node))
    }
}
