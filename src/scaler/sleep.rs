//! vLLM's sleep mode, as its development mode lets it be told over HTTP.
//!
//! `/sleep`, `/wake_up` and `/is_sleeping` are there with `VLLM_SERVER_DEV_MODE=1`, and free memory with
//! `--enable-sleep-mode`. A server that sleeps says 200 at `/health`, and takes requests that it does not answer before
//! it is awake, so neither tells anything.

use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use tokio::time::{sleep, timeout};

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

/// Has the server sleep. It must have no request: vLLM would abort it.
pub(super) async fn fall_asleep(address: &str, level: u8) -> Result<(), SleepError> {
    let path = if level == 2 { "/sleep?level=2" } else { "/sleep?level=1" };
    match timeout(FALLING, tell(address, Question::post(path, ""), "/sleep")).await {
        Ok(told) => told.map(drop),
        Err(_) => Err(SleepError::Silent("/sleep", Answer::TimedOut(FALLING.into()))),
    }
}

/// Has the server wake, and waits until it says that it is awake, asking `every` so often. The caller has a deadline.
pub(super) async fn wake_up(address: &str, level: u8, every: Duration) -> Result<(), SleepError> {
    if level == 2 {
        // There must be weights before there is a KV cache, as vLLM's documentation has it: reading them takes room.
        tell(address, Question::post("/wake_up?tags=weights", ""), "/wake_up").await?;
        let reload = Question::post("/collective_rpc", r#"{"method":"reload_weights"}"#);
        tell(address, reload, "/collective_rpc").await?;
        tell(address, Question::post("/wake_up?tags=kv_cache", ""), "/wake_up").await?;
    } else {
        tell(address, Question::post("/wake_up", ""), "/wake_up").await?;
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
    let said = tell(address, Question::get("/is_sleeping"), "/is_sleeping").await?;
    let said: Said = serde_json::from_slice(&said).map_err(|_| SleepError::Unclear)?;
    Ok(said.is_sleeping)
}

async fn tell(address: &str, question: Question<'_>, name: &'static str) -> Result<Bytes, SleepError> {
    match call(address, question).await {
        Ok((status, body)) if status.is_success() => Ok(body),
        Ok((StatusCode::NOT_FOUND, _)) => Err(SleepError::Unknown(name)),
        Ok((status, _)) => Err(SleepError::Refused(name, status.as_u16())),
        Err(answer) => Err(SleepError::Silent(name, answer)),
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
        net::TcpListener,
    };

    use super::*;

    /// A server that says these, one after the other, and what it was asked while `work` went on.
    async fn server<T>(says: &[&str], work: impl AsyncFnOnce(String) -> T) -> (T, Vec<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let serve = async {
            let mut asked = Vec::new();
            for says in says {
                let mut stream = BufReader::new(listener.accept().await.unwrap().0);
                let (mut head, mut length) = (String::new(), 0);
                while !head.ends_with("\r\n\r\n") {
                    let from = head.len();
                    stream.read_line(&mut head).await.unwrap();
                    if let Some(said) = head[from..].strip_prefix("content-length: ") {
                        length = said.trim().parse().unwrap();
                    }
                }
                let mut body = vec![0; length];
                stream.read_exact(&mut body).await.unwrap();
                let line = head.lines().next().unwrap().trim_end_matches(" HTTP/1.1");
                asked.push(format!("{line} {}", String::from_utf8(body).unwrap()).trim().to_owned());
                let (status, body) = says.split_once(' ').unwrap_or((says, ""));
                let answer = format!("HTTP/1.1 {status} x\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
            asked
        };
        tokio::join!(work(address), serve)
    }

    #[tokio::test]
    async fn it_is_awake_when_it_says_so_and_not_before() {
        let wake = async |address: String| wake_up(&address, 1, Duration::ZERO).await;
        let asleep = "200 {\"is_sleeping\":true}";
        let (woken, asked) = server(&["200", asleep, asleep, "200 {\"is_sleeping\":false}"], wake).await;
        woken.unwrap();
        let ask = "GET /is_sleeping";
        assert_eq!(asked, ["POST /wake_up", ask, ask, ask]);
        let (woken, _) = server(&["200", "200 soon"], wake).await;
        assert!(matches!(woken, Err(SleepError::Unclear)), "{woken:?}");
    }

    #[tokio::test]
    async fn from_level_2_the_weights_are_read_again_before_there_is_a_kv_cache() {
        let (slept, asked) = server(&["200"], async |address| fall_asleep(&address, 2).await).await;
        slept.unwrap();
        assert_eq!(asked, ["POST /sleep?level=2"]);
        let wake = async |address: String| wake_up(&address, 2, Duration::ZERO).await;
        let (woken, asked) = server(&["200", "200", "200", "200 {\"is_sleeping\":false}"], wake).await;
        woken.unwrap();
        let expected = [
            "POST /wake_up?tags=weights",
            "POST /collective_rpc {\"method\":\"reload_weights\"}",
            "POST /wake_up?tags=kv_cache",
            "GET /is_sleeping",
        ];
        assert_eq!(asked, expected);
        let (woken, asked) = server(&["200", "500"], wake).await;
        assert_eq!(woken.unwrap_err().to_string(), "/collective_rpc was answered with status 500");
        assert_eq!(asked.len(), 2, "without weights it is better left asleep");
    }

    #[tokio::test]
    async fn a_server_without_sleep_mode_is_told_of_with_the_way_out() {
        let (slept, _) = server(&["404"], async |address| fall_asleep(&address, 1).await).await;
        let error = slept.unwrap_err().to_string();
        assert!(
            error.starts_with("it does not know /sleep: start vLLM with the flag --enable-sleep-mode"),
            "{error}"
        );
        assert!(error.contains("VLLM_SERVER_DEV_MODE: \"1\""), "{error}");
    }

    #[tokio::test]
    async fn a_server_that_is_gone_is_said_to_be() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        drop(listener);
        let error = fall_asleep(&address, 1).await.unwrap_err().to_string();
        assert_eq!(error, "/sleep saw: connection refused");
    }
}
