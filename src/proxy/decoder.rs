//! Answers that are encoded although nobody asked for that: decoded where other bytes have gone out before them.

use std::io::{self, Write};

use bytes::{Bytes, BytesMut};
use flate2::write::{MultiGzDecoder, ZlibDecoder};
use http::{HeaderMap, header::CONTENT_ENCODING};

/// Undoes a content coding, part by part and within bounds, whatever the parts decode to.
pub struct Decoder {
    coding: Coding,
    /// What has come and is not decoded yet.
    encoded: Bytes,
}

enum Coding {
    Gzip(MultiGzDecoder<Vec<u8>>),
    Deflate(ZlibDecoder<Vec<u8>>),
}

/// So many encoded bytes are decoded at a time. Deflate makes at most 1032 bytes of one, so that what comes of them is
/// about a mebibyte.
const PIECE: usize = 1024;

// === impl Decoder ===

impl Decoder {
    /// What decodes an answer with this head; `None` where it is not encoded.
    ///
    /// # Errors
    /// Returns the name of a coding that is not supported.
    pub fn of(head: &HeaderMap) -> Result<Option<Box<Self>>, String> {
        let Some(name) = encoding(head) else { return Ok(None) };
        let coding = match &*name.to_ascii_lowercase() {
            "gzip" | "x-gzip" => Coding::Gzip(MultiGzDecoder::new(Vec::new())),
            "deflate" => Coding::Deflate(ZlibDecoder::new(Vec::new())),
            _ => return Err(name),
        };
        Ok(Some(Box::new(Self { coding, encoded: Bytes::new() })))
    }

    /// Takes the next encoded part, when [`Self::next`] has given all there was.
    pub fn push(&mut self, part: Bytes) {
        debug_assert!(self.encoded.is_empty(), "the part before has been decoded");
        self.encoded = part;
    }

    /// Some more of what has been decoded; `None` when another part is needed.
    ///
    /// # Errors
    /// When what came is not in that coding.
    pub fn next(&mut self) -> io::Result<Option<Bytes>> {
        while !self.encoded.is_empty() {
            let piece = self.encoded.split_to(self.encoded.len().min(PIECE));
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

    /// The rest, at the end of the answer.
    ///
    /// # Errors
    /// When the answer ended too early.
    pub fn finish(mut self) -> io::Result<Bytes> {
        match &mut self.coding {
            Coding::Gzip(gzip) => gzip.try_finish()?,
            Coding::Deflate(deflate) => deflate.try_finish()?,
        }
        self.coding.decode(|_| Ok(()))
    }

    /// Decodes a whole answer, of which there may be so many bytes.
    ///
    /// # Errors
    /// When it cannot be decoded, or is longer.
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

// === impl Coding ===

impl Coding {
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

/// The coding of an answer, where there is any.
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

    fn decoder(coding: &str) -> Result<Option<Box<Decoder>>, String> {
        Decoder::of(&[(CONTENT_ENCODING, coding.parse().unwrap())].into_iter().collect())
    }

    fn gzip(text: &[u8]) -> Vec<u8> {
        let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
        gzip.write_all(text).unwrap();
        gzip.finish().unwrap()
    }

    /// What comes of parts of so many bytes each.
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
    fn decoder_does_not_mind_how_an_answer_is_cut() {
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

    /// What was flushed can be read before the end: an event does not wait for the next one.
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
            assert!(part.len() <= 2 << 20, "{} bytes of {PIECE}", part.len());
            all += part.len();
        }
        assert_eq!(all, 64 << 20);
        let whole = super::Decoder::of(&[(CONTENT_ENCODING, "gzip".parse().unwrap())].into_iter().collect());
        assert!(whole.unwrap().unwrap().whole(bomb.into(), 1 << 20).is_err());
    }

    #[test]
    fn other_codings_are_refused_by_name() {
        for coding in ["br", "zstd", "gzip, br"] {
            let error = decoder(coding).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains(&format!("`{coding}`")), "{error}");
        }
        assert!(decoder("identity").unwrap().is_none() && decoder("").unwrap().is_none());
    }
}
