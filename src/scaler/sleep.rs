//! vLLM's sleep mode, as its development mode lets it be told over HTTP.
//!
//! `/sleep`, `/wake_up` and `/is_sleeping` are there with `VLLM_SERVER_DEV_MODE=1`, and free memory with
//! `--enable-sleep-mode`. A server that sleeps says 200 at `/health`, and takes requests that it does not answer before
//! it is awake, so neither tells anything.

use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use tokio::time::sleep;

use crate::probe::{Answer, Question, call};

/// Why a server does not sleep, or not wake.
#[derive(Debug, thiserror::Error)]
pub(super) enum SleepError {
    /// It does not know the paths.
    #[error(
        "it does not know {0}: start vLLM with the flag --enable-sleep-mode, and with VLLM_SERVER_DEV_MODE: \"1\" in \
         target.process.env"
    )]
    Unknown(&'static str),
    /// It said something else than that it was done.
    #[error("{0} was answered with status {1}")]
    Refused(&'static str, u16),
    /// It said nothing.
    #[error("{0} saw: {1}")]
    Silent(&'static str, Answer),
    /// It does not say whether it sleeps.
    #[error("/is_sleeping was answered with something that we do not understand")]
    Unclear,
}

/// How long a server may take to fall asleep: it copies its weights into the machine's memory, at some GB a second.
const FALLING: Duration = Duration::from_secs(5 * 60);
/// How long it may take to say whether it sleeps.
const ASKING: Duration = Duration::from_secs(10);

/// Has the server sleep. It must have no request: vLLM would abort it.
pub(super) async fn fall_asleep(address: &str, level: u8) -> Result<(), SleepError> {
    let path = if level == 2 { "/sleep?level=2" } else { "/sleep?level=1" };
    tell(address, Question::post(path, ""), "/sleep", FALLING).await.map(drop)
}

/// Has the server wake, and waits until it says that it is awake, asking `every` so often. Each step may take `limit`;
/// who calls has a deadline for all of them.
pub(super) async fn wake_up(
    address: &str,
    level: u8,
    every: Duration,
    limit: Duration,
) -> Result<(), SleepError> {
    let steps = [
        // The weights are read before there is a KV cache, as vLLM's documentation has it: they need the room.
        (Question::post("/wake_up?tags=weights", ""), "/wake_up"),
        (Question::post("/collective_rpc", r#"{"method":"reload_weights"}"#), "/collective_rpc"),
        (Question::post("/wake_up?tags=kv_cache", ""), "/wake_up"),
    ];
    if level == 2 {
        for (question, name) in steps {
            tell(address, question, name, limit).await?;
        }
    } else {
        tell(address, Question::post("/wake_up", ""), "/wake_up", limit).await?;
    }
    while is_sleeping(address).await? {
        sleep(every).await;
    }
    Ok(())
}

async fn is_sleeping(address: &str) -> Result<bool, SleepError> {
    #[derive(serde::Deserialize)]
    struct Said {
        is_sleeping: bool,
    }
    let said = tell(address, Question::get("/is_sleeping"), "/is_sleeping", ASKING).await?;
    let said: Said = serde_json::from_slice(&said).map_err(|_| SleepError::Unclear)?;
    Ok(said.is_sleeping)
}

async fn tell(
    address: &str,
    question: Question<'_>,
    name: &'static str,
    limit: Duration,
) -> Result<Bytes, SleepError> {
    match call(address, question, limit).await {
        Ok((status, body)) if status.is_success() => Ok(body),
        Ok((StatusCode::NOT_FOUND, _)) => Err(SleepError::Unknown(name)),
        Ok((status, _)) => Err(SleepError::Refused(name, status.as_u16())),
        Err(answer) => Err(SleepError::Silent(name, answer)),
    }
}
