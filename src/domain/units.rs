//! Durations and sizes in human units: `15m`, `64MiB`.

use std::{borrow::Cow, fmt, time::Duration};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A duration, written with its unit: `100ms`, `20s`, `15m`, `1h 30m`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Period(Duration);

/// A size, written with its unit: `64MiB`, `1GB`, or a plain number of bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteCount(usize);

/// A share, from 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Ratio(f64);

/// Sound because a [`Ratio`] is never NaN.
impl Eq for Ratio {}

// === impl Period ===

impl Period {
    /// Zero.
    pub const ZERO: Self = Self(Duration::ZERO);

    /// Creates a period from whole seconds.
    pub const fn from_secs(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }

    /// Creates a period from whole milliseconds.
    pub const fn from_millis(milliseconds: u64) -> Self {
        Self(Duration::from_millis(milliseconds))
    }

    /// Returns the period as a [`Duration`].
    pub const fn get(self) -> Duration {
        self.0
    }
}

impl From<Duration> for Period {
    fn from(duration: Duration) -> Self {
        Self(duration)
    }
}

impl std::str::FromStr for Period {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "0" {
            return Ok(Self(Duration::ZERO));
        }
        humantime::parse_duration(text).map(Self).map_err(|_| {
            format!("\"{text}\" is not a duration; write a number and a unit, such as 100ms, 20s or 15m")
        })
    }
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(self.0).fmt(f)
    }
}

impl fmt::Debug for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl<'de> Deserialize<'de> for Period {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<'_, str>::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

impl Serialize for Period {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl JsonSchema for Period {
    fn schema_name() -> Cow<'static, str> {
        "Duration".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": ["string", "integer"],
            "description": "A duration with its unit: 100ms, 20s, 15m, 1h 30m.",
            "pattern": r"^(0|(\d+ ?(ns|us|ms|s|m|h|d|sec|secs|min|mins|hr|hrs|hours?|minutes?|seconds?|days?) ?)+)$",
            // 0 is the only number without a unit.
            "minimum": 0,
            "maximum": 0,
            "examples": ["100ms", "20s", "15m"],
        })
    }
}

// === impl ByteCount ===

impl ByteCount {
    /// Effectively unlimited.
    pub const MAX: Self = Self(usize::MAX);

    /// Creates a size from whole MiB.
    pub const fn mebibytes(count: usize) -> Self {
        Self(count << 20)
    }

    /// Creates a size from bytes.
    pub const fn bytes(count: usize) -> Self {
        Self(count)
    }

    /// Returns the size in bytes.
    pub const fn get(self) -> usize {
        self.0
    }
}

impl std::str::FromStr for ByteCount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "\"{text}\" is not a number of bytes; write a number and a unit, such as 512KiB, 64MiB or 1GiB"
            )
        };
        let count = text.parse::<bytesize::ByteSize>().map_err(|_| wrong())?;
        usize::try_from(count.as_u64()).map(Self).map_err(|_| wrong())
    }
}

impl fmt::Display for ByteCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const BYTE_UNITS: [(usize, &str); 3] = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
        match BYTE_UNITS.into_iter().find(|(unit, _)| self.0 >= *unit && self.0.is_multiple_of(*unit)) {
            Some((unit, name)) => write!(f, "{}{name}", self.0 / unit),
            None => write!(f, "{}B", self.0),
        }
    }
}

impl fmt::Debug for ByteCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl<'de> Deserialize<'de> for ByteCount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ByteCountVisitor;

        impl de::Visitor<'_> for ByteCountVisitor {
            type Value = ByteCount;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of bytes such as 64MiB")
            }

            fn visit_u64<E: de::Error>(self, count: u64) -> Result<ByteCount, E> {
                usize::try_from(count).map(ByteCount).map_err(E::custom)
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<ByteCount, E> {
                text.parse().map_err(E::custom)
            }
        }

        deserializer.deserialize_any(ByteCountVisitor)
    }
}

impl Serialize for ByteCount {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl JsonSchema for ByteCount {
    fn schema_name() -> Cow<'static, str> {
        "ByteCount".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": ["string", "integer"],
            "description": "A size in bytes with its unit: 512KiB, 64MiB, 1GB.",
            "minimum": 0,
            "examples": ["64MiB", "1GiB"],
        })
    }
}

// === impl Ratio ===

impl Ratio {
    /// Creates a share; `None` if it is not between 0 and 1.
    pub fn new(share: f64) -> Option<Self> {
        (0.0..=1.0).contains(&share).then_some(Self(share))
    }

    /// Returns the share as a number.
    pub const fn get(self) -> f64 {
        self.0
    }
}

impl Default for Ratio {
    /// Returns 1.
    fn default() -> Self {
        Self(1.0)
    }
}

impl<'de> Deserialize<'de> for Ratio {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let share = f64::deserialize(deserializer)?;
        Self::new(share)
            .ok_or_else(|| de::Error::custom(format!("{share} is out of range; write a number from 0 to 1")))
    }
}

impl Serialize for Ratio {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.0)
    }
}

impl JsonSchema for Ratio {
    fn schema_name() -> Cow<'static, str> {
        "Ratio".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "number", "description": "A share.", "minimum": 0, "maximum": 1 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_round_trip_in_human_units() {
        for text in ["100ms", "20s", "15m", "1h 30m"] {
            assert_eq!(text.parse::<Period>().unwrap().to_string(), text);
        }
        for text in ["512KiB", "64MiB", "1GiB", "1000B"] {
            assert_eq!(text.parse::<ByteCount>().unwrap().to_string(), text);
        }
        assert_eq!("0".parse::<Period>().unwrap(), Period::from_secs(0));
        assert!("5".parse::<Period>().unwrap_err().contains("20s"));
        assert!("many".parse::<ByteCount>().unwrap_err().contains("64MiB"));
    }
}
