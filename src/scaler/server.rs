//! One run of a model server: a process under its guardian.

use std::{
    io, iter,
    net::{Ipv4Addr, SocketAddr},
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::Arc,
};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::unix::pipe,
    process::{Child, ChildStdin, Command},
    time::Instant,
};

use super::{
    Options,
    output::{ProcessOutput, cause_line},
};
use crate::{
    admission::Gate,
    domain::{ProcessTarget, Reason, RouteKey},
    guardian,
};

/// A running model server. Dropping this closes the lifeline, so the guardian stops the server.
pub(super) struct ModelServer {
    guardian: Child,
    /// The guardian stops the server when this closes.
    lifeline: Option<ChildStdin>,
    output: ProcessOutput,
    address: String,
    started: Instant,
}

/// Arguments of every guardian of a route.
pub(super) struct GuardianOptions {
    program: PathBuf,
    open_files: Option<u64>,
    lock: Option<String>,
}

/// A command that could not be started.
#[derive(Debug, thiserror::Error)]
pub(super) enum SpawnError {
    #[error("no free port was found for the command: {0}")]
    Port(io::Error),
    #[error("the folder to start the command in, `{0}`, does not exist")]
    Directory(String),
    #[error("the command could not be started: {0}")]
    Spawn(io::Error),
}

/// Reason of a server's exit, for waiting clients, and its last lines of output.
pub(super) struct ServerExit {
    pub(super) reason: Reason,
    pub(super) last_lines: Vec<String>,
}

// === impl GuardianOptions ===

impl GuardianOptions {
    pub(super) fn new(options: &Options, route: &RouteKey) -> Self {
        Self {
            program: options.guardian.clone(),
            open_files: options.open_files,
            lock: options.instance.as_ref().map(|instance| format!("anteroom/{instance}/{route}")),
        }
    }

    /// Returns the guardian's command, up to the `--` before the model server's.
    fn command(&self, target: &ProcessTarget) -> Command {
        let mut command = Command::new(&self.program);
        let stop_timeout = target.stop_timeout.get().as_millis().to_string();
        command.arg0("anteroom").args(["guardian", "--stop-timeout", &stop_timeout]);
        if let Some(open_files) = self.open_files {
            command.args(["--open-files", &open_files.to_string()]);
        }
        if let Some(lock) = &self.lock {
            command.args(["--lock", lock]);
        }
        command.arg("--");
        command
    }
}

// === impl ModelServer ===

impl ModelServer {
    /// Starts the command on a free port. Parts of the load found in its log are recorded in the cold start.
    pub(super) fn start(
        target: &ProcessTarget,
        guardian: &GuardianOptions,
        gate: &Arc<Gate>,
    ) -> Result<Self, SpawnError> {
        let port = free_port().map_err(SpawnError::Port)?;
        let with_port = |text: &String| text.replace("{port}", &port.to_string());
        // A single pipe for stdout and stderr keeps the order of lines.
        let (output, printed) = io::pipe().map_err(SpawnError::Spawn)?;
        let mut command = guardian.command(target);
        command
            .args(target.command.iter().map(with_port))
            .envs(target.env.iter().map(|(name, value)| (name, with_port(value))))
            .stdin(Stdio::piped())
            .stdout(printed.try_clone().map_err(SpawnError::Spawn)?)
            .stderr(printed)
            // Ctrl-C at the terminal must not reach the server, which stops after its requests.
            .process_group(0);
        if let Some(directory) = &target.directory {
            if !Path::new(directory).is_dir() {
                return Err(SpawnError::Directory(directory.clone()));
            }
            command.current_dir(directory);
        }
        let mut guardian = command.spawn().map_err(SpawnError::Spawn)?;
        // Closes our copies of the writing end, so that reading ends with the last process that has one.
        drop(command);
        let lifeline = guardian.stdin.take();
        let output = pipe::Receiver::from_owned_fd(output.into()).map_err(SpawnError::Spawn)?;
        let tracked = gate.clone();
        let output = ProcessOutput::read(output, gate.key().clone(), move |part| {
            tracked.cold_starts().record_part(part)
        });
        let address = format!("{}:{port}", Ipv4Addr::LOCALHOST);
        Ok(Self { guardian, lifeline, output, address, started: Instant::now() })
    }

    /// Returns the time of the start.
    pub(super) const fn started(&self) -> Instant {
        self.started
    }

    /// Returns the address that the server will listen on.
    pub(super) fn address(&self) -> &str {
        &self.address
    }

    /// Ends the parsing of its log: the server is ready.
    pub(super) fn set_loaded(&self) {
        self.output.set_loaded();
    }

    /// Waits for the exit. Cancel-safe.
    pub(super) async fn exited(&mut self) -> io::Result<ExitStatus> {
        self.guardian.wait().await
    }

    /// Describes an exit while `doing` something.
    pub(super) async fn exit(&mut self, status: io::Result<ExitStatus>, doing: &str) -> ServerExit {
        let last_lines = self.output.finish().await;
        ServerExit { reason: describe_exit(status, doing, &last_lines), last_lines }
    }

    /// Returns the last lines of output so far.
    pub(super) fn last_lines(&self) -> Vec<String> {
        self.output.last_lines()
    }

    /// Stops the server and its children: SIGTERM, then SIGKILL after `stopTimeout`.
    pub(super) async fn stop(mut self) {
        self.lifeline = None;
        let _ = self.guardian.wait().await;
    }
}

/// Finds a free port that is likely to be free when the server binds it seconds later: below the ephemeral range of the
/// kernel and Kubernetes' node ports.
fn free_port() -> io::Result<u16> {
    const MAX_TRIES: usize = 100;
    let below = iter::repeat_with(|| fastrand::u16(20_000..30_000)).take(MAX_TRIES);
    below.map(try_port).find_map(Result::ok).map_or_else(|| try_port(0), Ok)
}

/// Returns the port if it is free; 0 finds a free one. Without `SO_REUSEADDR`, which would hide a server that is bound but
/// does not listen yet, as vLLM while it loads.
fn try_port(port: u16) -> io::Result<u16> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)).into())?;
    let address = socket.local_addr()?.as_socket();
    Ok(address.map_or(port, |address| address.port()))
}

fn describe_exit(status: io::Result<ExitStatus>, doing: &str, last_lines: &[String]) -> Reason {
    let last = cause_line(last_lines).as_deref().map(shortened);
    let how = match status {
        Ok(status) => match (status.code(), status.signal()) {
            (Some(126 | 127), _)
                if let Some(said) =
                    last_lines.last().and_then(|line| line.strip_prefix(guardian::LOG_PREFIX)) =>
            {
                return format!("the command could not be started: {said}").into();
            }
            (Some(code), _) => format!("exited with code {code}"),
            (None, Some(signal)) => match signal_hook::low_level::signal_name(signal) {
                Some(name) => format!("was killed by {name}"),
                None => format!("was killed by signal {signal}"),
            },
            (None, None) => "ended".into(),
        },
        Err(error) => format!("could not be waited for ({error})"),
    };
    let brief = format!("the command {how} while {doing}");
    match last {
        Some(last) => Reason::with_output(&brief, &format!("{brief}; its last line: {last}")),
        None => format!("{brief}, without output").into(),
    }
}

/// Shortens a line for an error message.
fn shortened(line: &str) -> String {
    const MAX_CHARS: usize = 300;
    match line.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bound_port_is_not_free() {
        let bound = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        bound.set_reuse_address(true).unwrap();
        bound.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
        let taken = bound.local_addr().unwrap().as_socket().unwrap().port();
        assert_eq!(try_port(taken).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert!((20_000..30_000).contains(&free_port().unwrap()));
    }

    #[test]
    fn exit_is_described_with_its_last_line() {
        let lines = |text: &str| vec![text.to_owned()];
        let code = |code: i32| Ok(ExitStatus::from_raw(code << 8));
        for (status, last, expected) in [
            (code(1), lines("no GPU"), "the command exited with code 1 while loading; its last line: no GPU"),
            (code(3), vec![], "the command exited with code 3 while loading, without output"),
            (
                Ok(ExitStatus::from_raw(9)),
                vec![],
                "the command was killed by SIGKILL while loading, without output",
            ),
            (
                code(127),
                lines("anteroom guardian: cannot run `vlm`: No such file"),
                "the command could not be started: cannot run `vlm`: No such file",
            ),
            (
                code(127),
                lines("sh: 1: vlm: not found"),
                "the command exited with code 127 while loading; its last line: sh: 1: vlm: not found",
            ),
        ] {
            let reason = describe_exit(status, "loading", &last);
            assert_eq!(&*reason, expected);
            let brief = expected.split("; its last line").next().unwrap();
            assert_eq!(&**reason.brief(), brief, "clients do not get its output");
        }
        assert_eq!(shortened(&"ä".repeat(301)).chars().count(), 301);
    }
}
