//! Decoding of responses that an endpoint encoded unasked, where the early response head has named no encoding.

use std::io::{self, Write};

use bytes::{Bytes, BytesMut};
use flate2::write::{MultiGzDecoder, ZlibDecoder};
use http::{HeaderMap, header::CONTENT_ENCODING};

/// Decodes a content coding incrementally, with bounded output per step.
pub struct ContentDecoder {
    coding: ContentCoding,
    /// Received, but not decoded yet.
    encoded: Bytes,
}

enum ContentCoding {
    Gzip(MultiGzDecoder<Vec<u8>>),
    Deflate(ZlibDecoder<Vec<u8>>),
}

/// Encoded bytes decoded per step. Deflate expands at most 1032-fold, so a step yields about 1 MiB.
const STEP_BYTES: usize = 1024;

// === impl ContentDecoder ===

impl ContentDecoder {
    /// Creates the decoder for a response with this head. Returns `None` if the response is not encoded.
    ///
    /// # Errors
    /// Returns the name of a coding that is not supported.
    pub fn of(head: &HeaderMap) -> Result<Option<Box<Self>>, String> {
        let Some(name) = encoding(head) else { return Ok(None) };
        let coding = match &*name.to_ascii_lowercase() {
            "gzip" | "x-gzip" => ContentCoding::Gzip(MultiGzDecoder::new(Vec::new())),
            "deflate" => ContentCoding::Deflate(ZlibDecoder::new(Vec::new())),
            _ => return Err(name),
        };
        Ok(Some(Box::new(Self { coding, encoded: Bytes::new() })))
    }

    /// Takes the next encoded part. Call only after [`Self::next`] has returned `None`.
    pub fn push(&mut self, part: Bytes) {
        debug_assert!(self.encoded.is_empty(), "the part before has been decoded");
        self.encoded = part;
    }

    /// Decodes the next step, of at most `STEP_BYTES` encoded bytes. Returns `None` when another part is needed.
    ///
    /// # Errors
    /// The data is invalid.
    pub fn next(&mut self) -> io::Result<Option<Bytes>> {
        while !self.encoded.is_empty() {
            let piece = self.encoded.split_to(self.encoded.len().min(STEP_BYTES));
            let decoded = self.coding.decode(|writer| {
                writer.write_all(&piece)?;
                writer.flush()
            })?;
            if !decoded.is_empty() {
                return Ok(Some(decoded));
            }
        }
        Ok(None)
    }

    /// Returns the rest at the end of the response.
    ///
    /// # Errors
    /// The data is truncated.
    pub fn finish(mut self) -> io::Result<Bytes> {
        match &mut self.coding {
            ContentCoding::Gzip(gzip) => gzip.try_finish()?,
            ContentCoding::Deflate(deflate) => deflate.try_finish()?,
        }
        self.coding.decode(|_| Ok(()))
    }

    /// Decodes a whole response.
    ///
    /// # Errors
    /// The data is invalid, or longer than `limit` bytes once decoded.
    pub fn whole(mut self, encoded: Bytes, limit: usize) -> io::Result<Bytes> {
        let mut whole = BytesMut::new();
        self.push(encoded);
        while let Some(part) = self.next()? {
            whole.extend_from_slice(&part);
            if whole.len() > limit {
                return Err(io::Error::other("it is too long"));
            }
        }
        whole.extend_from_slice(&self.finish()?);
        Ok(whole.freeze())
    }
}

// === impl ContentCoding ===

impl ContentCoding {
    fn decode(&mut self, work: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<Bytes> {
        let decoded = match self {
            Self::Gzip(gzip) => {
                work(gzip)?;
                gzip.get_mut()
            }
            Self::Deflate(deflate) => {
                work(deflate)?;
                deflate.get_mut()
            }
        };
        Ok(std::mem::take(decoded).into())
    }
}

/// Returns the content coding of a response, unless it is `identity`.
pub(super) fn encoding(head: &HeaderMap) -> Option<String> {
    let mut codings = head.get_all(CONTENT_ENCODING).iter().map(|coding| coding.as_bytes());
    let is_identity = |coding: &[u8]| coding.is_empty() || coding.eq_ignore_ascii_case(b"identity");
    let encoded = codings.any(|coding| !is_identity(coding));
    encoded.then(|| {
        let all =
            head.get_all(CONTENT_ENCODING).iter().map(|coding| String::from_utf8_lossy(coding.as_bytes()));
        all.collect::<Vec<_>>().join(", ")
    })
}

#[cfg(test)]
mod tests {
    use flate2::{Compression, write::GzEncoder, write::ZlibEncoder};

    use super::*;

    fn decoder(coding: &str) -> Result<Option<Box<ContentDecoder>>, String> {
        ContentDecoder::of(&[(CONTENT_ENCODING, coding.parse().unwrap())].into_iter().collect())
    }

    fn gzip(text: &[u8]) -> Vec<u8> {
        let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
        gzip.write_all(text).unwrap();
        gzip.finish().unwrap()
    }

    /// Decodes in parts of `size` bytes.
    fn decode(coding: &str, encoded: &[u8], size: usize) -> io::Result<Vec<u8>> {
        let mut decoder = decoder(coding).unwrap().unwrap();
        let mut decoded = Vec::new();
        for part in encoded.chunks(size) {
            decoder.push(Bytes::copy_from_slice(part));
            while let Some(part) = decoder.next()? {
                decoded.extend_from_slice(&part);
            }
        }
        decoded.extend_from_slice(&decoder.finish()?);
        Ok(decoded)
    }

    #[test]
    fn decoding_is_independent_of_part_sizes() {
        let text = "data: {\"choices\":[]}\n\n".repeat(500);
        let mut zlib = ZlibEncoder::new(Vec::new(), Compression::default());
        zlib.write_all(text.as_bytes()).unwrap();
        let zlib = zlib.finish().unwrap();
        let twice = [gzip(&text.as_bytes()[..100]), gzip(&text.as_bytes()[100..])].concat();
        for (coding, encoded) in [("gzip", &gzip(text.as_bytes())), ("X-GZIP", &twice), ("deflate", &zlib)] {
            for size in [1, 7, 1024, 1 << 20] {
                assert_eq!(decode(coding, encoded, size).unwrap(), text.as_bytes(), "{coding}, {size}");
            }
            assert!(decode(coding, &encoded[..encoded.len() - 1], 64).is_err(), "cut off");
            assert!(decode(coding, b"data: {}\n\n", 64).is_err(), "not encoded at all");
        }
        assert_eq!(decoder("gzip").unwrap().unwrap().whole(twice.into(), text.len()).unwrap(), text);
    }

    /// Events must not wait for the next one.
    #[test]
    fn flushed_events_are_decoded_at_once() {
        let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
        let mut decoder = decoder("gzip").unwrap().unwrap();
        for number in 0..3 {
            let event = format!("data: {number}\n\n");
            gzip.write_all(event.as_bytes()).unwrap();
            gzip.flush().unwrap();
            decoder.push(std::mem::take(gzip.get_mut()).into());
            assert_eq!(decoder.next().unwrap().unwrap(), event);
            assert!(decoder.next().unwrap().is_none());
        }
    }

    #[test]
    fn small_parts_of_a_bomb_stay_bounded() {
        let bomb = gzip(&vec![0; 64 << 20]);
        let mut decoder = decoder("gzip").unwrap().unwrap();
        decoder.push(bomb.clone().into());
        let mut all = 0;
        while let Some(part) = decoder.next().unwrap() {
            assert!(part.len() <= 2 << 20, "{} bytes of {STEP_BYTES}", part.len());
            all += part.len();
        }
        assert_eq!(all, 64 << 20);
        let whole =
            super::ContentDecoder::of(&[(CONTENT_ENCODING, "gzip".parse().unwrap())].into_iter().collect());
        assert!(whole.unwrap().unwrap().whole(bomb.into(), 1 << 20).is_err());
    }

    #[test]
    fn unsupported_codings_are_named() {
        for coding in ["br", "zstd", "gzip, br"] {
            assert_eq!(decoder(coding).map(|_| ()).unwrap_err(), coding);
        }
        assert!(decoder("identity").unwrap().is_none() && decoder("").unwrap().is_none());
    }
}
