//! Codec of this project's gRPC services.

use std::marker::PhantomData;

use prost::Message;
use tonic::codec::{BufferSettings, Codec};
use tonic_prost::{ProstDecoder, ProstEncoder};

/// Codec for protobuf whose buffers start small and grow with the messages. Those of tonic's codec start at 8 KiB,
/// which a stream of small messages keeps for as long as it is open.
#[derive(Debug)]
pub struct SmallBufferCodec<T, U>(PhantomData<(T, U)>);

/// Initial size of a buffer, in bytes: enough for most messages.
const CODEC_BUFFER_BYTES: usize = 256;

/// Bytes of encoded messages that are sent without encoding a further one.
const CODEC_YIELD_BYTES: usize = 16 << 10;

// === impl SmallBufferCodec ===

impl<T, U> Default for SmallBufferCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for SmallBufferCodec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::new(BufferSettings::new(CODEC_BUFFER_BYTES, CODEC_YIELD_BYTES))
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstDecoder::new(BufferSettings::new(CODEC_BUFFER_BYTES, CODEC_YIELD_BYTES))
    }
}
