//! W3C Trace Context: the trace of a request, and its propagation in headers.

use std::str::FromStr;

use opentelemetry::trace::TraceState;

/// The remote parent span in a `traceparent`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parent {
    /// Trace id, never 0.
    pub trace_id: u128,
    /// Span id, never 0.
    pub span_id: u64,
    /// Flags: the lowest bit is sampled, the others are passed on.
    pub flags: u8,
}

/// The trace of a request.
#[derive(Clone, Debug)]
pub struct Context {
    /// Trace id.
    pub trace_id: u128,
    /// Id of the remote parent span; 0 if the trace starts here.
    pub parent: u64,
    /// Flags, as in a `traceparent`.
    pub flags: u8,
    /// The `tracestate`.
    pub state: TraceState,
}

/// Flag of an exported trace.
const SAMPLED_FLAG: u8 = 1;

/// Known flags: sampled and random id. Unknown ones must not be passed on.
const KNOWN_FLAGS: u8 = 3;

// === impl Parent ===

impl Parent {
    /// Parses `00-{32 hex}-{16 hex}-{2 hex}`; a higher version may be longer (W3C Trace Context, section 3.2). `None`
    /// if it is invalid, which starts a new trace.
    pub fn parse(value: &[u8]) -> Option<Self> {
        let goes_on = value.len() == 55 || (value.get(..2)? != b"00" && value.get(55) == Some(&b'-'));
        let dashes = [2, 35, 52].into_iter().all(|dash| value.get(dash) == Some(&b'-'));
        if !goes_on || !dashes {
            return None;
        }
        let version = hex(&value[..2])?;
        let trace_id = hex(&value[3..35])?;
        let span_id = hex(&value[36..52])? as u64;
        let flags = hex(&value[53..55])? as u8 & KNOWN_FLAGS;
        (version != 0xff && trace_id != 0 && span_id != 0).then_some(Self { trace_id, span_id, flags })
    }

    /// Returns whether the trace's origin samples it.
    pub const fn is_sampled(self) -> bool {
        self.flags & SAMPLED_FLAG != 0
    }
}

/// Parses lower-case digits only: parsers that disagree on an id would split the trace.
fn hex(digits: &[u8]) -> Option<u128> {
    digits.iter().try_fold(0_u128, |number, digit| {
        let value = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        Some(number << 4 | u128::from(value))
    })
}

// === impl Context ===

impl Context {
    /// Starts a trace.
    pub fn new() -> Self {
        Self { trace_id: fastrand::u128(1..), parent: 0, flags: 0, state: TraceState::NONE }
    }

    /// Continues a trace. An invalid `tracestate` is omitted.
    pub fn child_of(parent: Parent, state: Option<&str>) -> Self {
        let state = state.and_then(|state| TraceState::from_str(state).ok()).unwrap_or_default();
        Self { trace_id: parent.trace_id, parent: parent.span_id, flags: parent.flags, state }
    }

    /// Sets or clears the sampled flag.
    pub const fn sample(&mut self, sampled: bool) {
        self.flags = self.flags & !SAMPLED_FLAG | sampled as u8;
    }

    /// Formats the `traceparent` for a child of this span.
    pub fn traceparent(&self, span_id: u64) -> String {
        format!("00-{:032x}-{span_id:016x}-{:02x}", self.trace_id, self.flags)
    }
}

impl Default for Context {
    fn default() -> Self {
        Self::new()
    }
}

/// Generates a span id.
pub(super) fn new_span_id() -> u64 {
    fastrand::u64(1..)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traceparent_is_parsed_strictly() {
        let parent = Parent {
            trace_id: 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c,
            span_id: 0xb7ad_6b71_6920_3331,
            flags: 1,
        };
        for (text, expected) in [
            ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", Some(parent)),
            ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00", Some(Parent { flags: 0, ..parent })),
            ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-ff", Some(Parent { flags: 3, ..parent })),
            ("01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", Some(parent)),
            ("01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more", Some(parent)),
            ("01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01.more", None),
            ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more", None),
            ("ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", None),
            ("00-00000000000000000000000000000000-b7ad6b7169203331-01", None),
            ("00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01", None),
            ("00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01", None),
            ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0", None),
            ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-", None),
            ("00_0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", None),
            ("0", None),
            ("", None),
        ] {
            assert_eq!(Parent::parse(text.as_bytes()), expected, "{text}");
        }
    }

    #[test]
    fn traceparent_round_trips() {
        let mut context = Context::new();
        for sampled in [true, false] {
            context.sample(sampled);
            let parent = Parent::parse(context.traceparent(7).as_bytes()).unwrap();
            assert_eq!((parent.trace_id, parent.span_id), (context.trace_id, 7));
            assert_eq!(parent.is_sampled(), sampled);
        }
        let parent = Parent { trace_id: 1, span_id: 2, flags: 3 };
        let context = Context::child_of(parent, Some("a=1,b@c=2"));
        assert_eq!(context.traceparent(9), "00-00000000000000000000000000000001-0000000000000009-03");
        assert_eq!(context.state.header(), "a=1,b@c=2");
        assert_eq!(Context::child_of(parent, Some("none at all")).state.header(), "");
    }
}
