//! A deserializer that edits a document on its way: it leaves out values, replaces others by texts, and reports the path
//! of an error. Decoding without the values that failed before finds further errors.

use std::{
    any::type_name, cell::RefCell, collections::BTreeMap, fmt, iter::once, marker::PhantomData, str::FromStr,
};

use serde::{
    Deserialize as _,
    de::{
        self, DeserializeSeed, Deserializer, EnumAccess, IgnoredAny, IntoDeserializer, MapAccess, SeqAccess,
        Unexpected, VariantAccess, Visitor,
        value::{MapAccessDeserializer, MapDeserializer, StringDeserializer},
    },
    forward_to_deserialize_any,
};

use super::source::{Faults, KeyPath};

/// Edits of a document, and the place where decoding failed.
pub(super) struct Edits<'e> {
    /// Values that are left out.
    faults: &'e Faults,
    /// Texts in place of values. They are converted as scalars of the file would be.
    texts: BTreeMap<KeyPath, &'e str>,
    failed: RefCell<Option<KeyPath>>,
}

/// A deserializer for the value at a path.
pub(super) struct Overlay<'e, D> {
    inner: D,
    path: KeyPath,
    edits: &'e Edits<'e>,
}

/// Wraps visitors, seeds and the accesses of lists, mappings and enums, for the value at a path.
struct OverlayWrap<'e, T> {
    inner: T,
    path: KeyPath,
    edits: &'e Edits<'e>,
}

/// Deserializer of a text in place of a scalar.
struct TextScalar<'t, E>(&'t str, PhantomData<E>);

struct OverlayList<'e, A> {
    list: OverlayWrap<'e, A>,
    next: usize,
}

struct OverlayMap<'e, A> {
    map: OverlayWrap<'e, A>,
    /// Path of the entry whose value is read next.
    value: KeyPath,
    /// Keys that get a stand-in value: the file has no valid one, and a route cannot be checked at all without them.
    stand_in_keys: Vec<&'static str>,
    /// True if the value that is read next is a stand-in.
    is_stand_in: bool,
}

// === impl Edits ===

impl<'e> Edits<'e> {
    pub(super) fn new(faults: &'e Faults, texts: BTreeMap<KeyPath, &'e str>) -> Self {
        Self { faults, texts, failed: RefCell::default() }
    }

    /// Returns the path of the innermost value that failed.
    pub(super) fn failed(self) -> KeyPath {
        self.failed.into_inner().unwrap_or_default()
    }

    /// Notes the path of an error. The first one is the innermost.
    fn note<T, E>(&self, path: &KeyPath, result: Result<T, E>) -> Result<T, E> {
        result.inspect_err(|_| {
            self.failed.borrow_mut().get_or_insert_with(|| path.clone());
        })
    }
}

// === impl Overlay ===

impl<'e, D> Overlay<'e, D> {
    pub(super) fn new(inner: D, edits: &'e Edits<'e>) -> Self {
        Self { inner, path: KeyPath::default(), edits }
    }
}

macro_rules! forward {
    ($($method:ident($($argument:ident: $kind:ty),*))*) => {$(
        fn $method<V: Visitor<'de>>(self, $($argument: $kind,)* visitor: V) -> Result<V::Value, D::Error> {
            let Self { inner, path, edits } = self;
            let result = match edits.texts.get(&path) {
                Some(text) => IgnoredAny::deserialize(inner)
                    .and_then(|_| TextScalar(text, PhantomData).$method($($argument,)* visitor)),
                None => {
                    let visitor = OverlayWrap { inner: visitor, path: path.clone(), edits };
                    inner.$method($($argument,)* visitor)
                }
            };
            edits.note(&path, result)
        }
    )*};
}

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Overlay<'_, D> {
    type Error = D::Error;

    forward! {
        deserialize_any()
        deserialize_bool()
        deserialize_i8()
        deserialize_i16()
        deserialize_i32()
        deserialize_i64()
        deserialize_i128()
        deserialize_u8()
        deserialize_u16()
        deserialize_u32()
        deserialize_u64()
        deserialize_u128()
        deserialize_f32()
        deserialize_f64()
        deserialize_char()
        deserialize_str()
        deserialize_string()
        deserialize_bytes()
        deserialize_byte_buf()
        deserialize_option()
        deserialize_unit()
        deserialize_unit_struct(name: &'static str)
        deserialize_newtype_struct(name: &'static str)
        deserialize_seq()
        deserialize_tuple(length: usize)
        deserialize_tuple_struct(name: &'static str, length: usize)
        deserialize_map()
        deserialize_struct(name: &'static str, fields: &'static [&'static str])
        deserialize_enum(name: &'static str, variants: &'static [&'static str])
        deserialize_identifier()
        deserialize_ignored_any()
    }

    fn is_human_readable(&self) -> bool {
        self.inner.is_human_readable()
    }
}

// === impl TextScalar ===

impl<E: de::Error> TextScalar<'_, E> {
    fn parse<T: FromStr>(&self) -> Result<T, E> {
        self.0.parse().map_err(|_| E::invalid_value(Unexpected::Str(self.0), &type_name::<T>()))
    }
}

macro_rules! parse_numbers {
    ($($method:ident $visit:ident)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, E> {
            visitor.$visit(self.parse()?)
        }
    )*};
}

impl<'de, E: de::Error> Deserializer<'de> for TextScalar<'_, E> {
    type Error = E;

    parse_numbers! {
        deserialize_bool visit_bool
        deserialize_i8 visit_i8
        deserialize_i16 visit_i16
        deserialize_i32 visit_i32
        deserialize_i64 visit_i64
        deserialize_i128 visit_i128
        deserialize_u8 visit_u8
        deserialize_u16 visit_u16
        deserialize_u32 visit_u32
        deserialize_u64 visit_u64
        deserialize_u128 visit_u128
        deserialize_f32 visit_f32
        deserialize_f64 visit_f64
    }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, E> {
        visitor.visit_str(self.0)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, E> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, E> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, E> {
        self.0.into_deserializer().deserialize_enum(name, variants, visitor)
    }

    forward_to_deserialize_any! {
        char str string bytes byte_buf unit unit_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}

// === impl OverlayWrap ===

macro_rules! forward_visits {
    ($($method:ident($($value:ident: $kind:ty)?))*) => {$(
        fn $method<E: de::Error>(self, $($value: $kind)?) -> Result<V::Value, E> {
            self.inner.$method($($value)?)
        }
    )*};
}

impl<'de, V: Visitor<'de>> Visitor<'de> for OverlayWrap<'_, V> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.expecting(f)
    }

    forward_visits! {
        visit_bool(value: bool)
        visit_i64(value: i64)
        visit_i128(value: i128)
        visit_u64(value: u64)
        visit_u128(value: u128)
        visit_f64(value: f64)
        visit_char(value: char)
        visit_str(value: &str)
        visit_borrowed_str(value: &'de str)
        visit_string(value: String)
        visit_bytes(value: &[u8])
        visit_borrowed_bytes(value: &'de [u8])
        visit_byte_buf(value: Vec<u8>)
        visit_none()
        visit_unit()
    }

    fn visit_some<D: Deserializer<'de>>(self, inner: D) -> Result<V::Value, D::Error> {
        self.inner.visit_some(Overlay { inner, path: self.path, edits: self.edits })
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, inner: D) -> Result<V::Value, D::Error> {
        self.inner.visit_newtype_struct(Overlay { inner, path: self.path, edits: self.edits })
    }

    fn visit_seq<A: SeqAccess<'de>>(self, inner: A) -> Result<V::Value, A::Error> {
        let list = OverlayWrap { inner, path: self.path, edits: self.edits };
        self.inner.visit_seq(OverlayList { list, next: 0 })
    }

    fn visit_map<A: MapAccess<'de>>(self, inner: A) -> Result<V::Value, A::Error> {
        let Faults { skipped, doubtful } = self.edits.faults;
        let lacks = |key: &&'static str| {
            let path = self.path.key(*key);
            skipped.contains(&path) || doubtful.contains(&path)
        };
        let stand_ins = match self.path.is_route() {
            true => ["name", "target"].into_iter().filter(lacks).collect(),
            false => Vec::new(),
        };
        let map = OverlayWrap { inner, path: self.path, edits: self.edits };
        self.inner.visit_map(OverlayMap {
            map,
            value: KeyPath::default(),
            stand_in_keys: stand_ins,
            is_stand_in: false,
        })
    }

    fn visit_enum<A: EnumAccess<'de>>(self, inner: A) -> Result<V::Value, A::Error> {
        self.inner.visit_enum(OverlayWrap { inner, path: self.path, edits: self.edits })
    }
}

impl<'de, S: DeserializeSeed<'de>> DeserializeSeed<'de> for OverlayWrap<'_, S> {
    type Value = S::Value;

    fn deserialize<D: Deserializer<'de>>(self, inner: D) -> Result<S::Value, D::Error> {
        let value = self.inner.deserialize(Overlay { inner, path: self.path.clone(), edits: self.edits });
        // Types that parse a text fail after the text was read.
        self.edits.note(&self.path, value)
    }
}

impl<'de, 'e, A: EnumAccess<'de>> EnumAccess<'de> for OverlayWrap<'e, A> {
    type Error = A::Error;
    type Variant = OverlayWrap<'e, A::Variant>;

    fn variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<(S::Value, Self::Variant), A::Error> {
        let (name, inner) = self.inner.variant::<String>()?;
        let path = self.path.key(&name);
        let variant = seed.deserialize(StringDeserializer::<A::Error>::new(name))?;
        Ok((variant, OverlayWrap { inner, path, edits: self.edits }))
    }
}

impl<'de, A: VariantAccess<'de>> VariantAccess<'de> for OverlayWrap<'_, A> {
    type Error = A::Error;

    fn unit_variant(self) -> Result<(), A::Error> {
        self.edits.note(&self.path, self.inner.unit_variant())
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, A::Error> {
        let seed = OverlayWrap { inner: seed, path: self.path.clone(), edits: self.edits };
        self.edits.note(&self.path, self.inner.newtype_variant_seed(seed))
    }

    fn tuple_variant<V: Visitor<'de>>(self, length: usize, visitor: V) -> Result<V::Value, A::Error> {
        let visitor = OverlayWrap { inner: visitor, path: self.path.clone(), edits: self.edits };
        self.edits.note(&self.path, self.inner.tuple_variant(length, visitor))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, A::Error> {
        let visitor = OverlayWrap { inner: visitor, path: self.path.clone(), edits: self.edits };
        self.edits.note(&self.path, self.inner.struct_variant(fields, visitor))
    }
}

// === impl OverlayList ===

impl<'de, A: SeqAccess<'de>> SeqAccess<'de> for OverlayList<'_, A> {
    type Error = A::Error;

    fn next_element_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, A::Error> {
        loop {
            let path = self.list.path.index(self.next);
            self.next += 1;
            let edits = self.list.edits;
            if !edits.faults.skipped.contains(&path) {
                return self.list.inner.next_element_seed(OverlayWrap { inner: seed, path, edits });
            }
            if self.list.inner.next_element::<IgnoredAny>()?.is_none() {
                return Ok(None);
            }
        }
    }
}

// === impl OverlayMap ===

impl<'de, A: MapAccess<'de>> MapAccess<'de> for OverlayMap<'_, A> {
    type Error = A::Error;

    fn next_key_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, A::Error> {
        while let Some(key) = self.map.inner.next_key::<String>()? {
            self.value = self.map.path.key(&key);
            if !self.map.edits.faults.skipped.contains(&self.value) {
                return seed.deserialize(StringDeserializer::new(key)).map(Some);
            }
            self.map.inner.next_value::<IgnoredAny>()?;
        }
        let Some(key) = self.stand_in_keys.pop() else { return Ok(None) };
        self.value = self.map.path.key(key);
        self.is_stand_in = true;
        seed.deserialize(key.into_deserializer()).map(Some)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, A::Error> {
        let path = std::mem::take(&mut self.value);
        if self.is_stand_in {
            let target = MapDeserializer::new(once(("url", "http://127.0.0.1:1")));
            return match path == self.map.path.key("name") {
                true => seed.deserialize("".into_deserializer()),
                false => seed.deserialize(MapAccessDeserializer::new(target)),
            };
        }
        self.map.inner.next_value_seed(OverlayWrap { inner: seed, path, edits: self.map.edits })
    }
}
