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
};

use super::{
    Options,
    output::{Output, telling},
};
use crate::{
    admission::Gate,
    domain::{ProcessTarget, Reason, RouteKey},
    guardian,
};

/// A running model server. Dropping it has the guardian end it.
pub(super) struct Server {
    guardian: Child,
    /// While it is held, the server may run.
    lifeline: Option<ChildStdin>,
    output: Output,
    address: String,
}

/// What every guardian of a route is started with.
pub(super) struct GuardianOptions {
    program: PathBuf,
    open_files: Option<u64>,
    lock: Option<String>,
}

/// Why a server could not even be started.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    #[error("no free port was found for the command: {0}")]
    Port(io::Error),
    #[error("the folder to start the command in, `{0}`, does not exist")]
    Directory(String),
    #[error("the command could not be started: {0}")]
    Spawn(io::Error),
}

/// How a server ended: the reason, for whoever waited for it, and its last lines.
pub(super) struct End {
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

    /// The command that runs the guardian, up to the `--` before the model server's own.
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

// === impl Server ===

impl Server {
    /// Starts the command on a free port. What its log tells of its start goes to the cold start that runs.
    pub(super) fn start(
        target: &ProcessTarget,
        guardian: &GuardianOptions,
        gate: &Arc<Gate>,
    ) -> Result<Self, StartError> {
        let port = free_port().map_err(StartError::Port)?;
        let with_port = |text: &String| text.replace("{port}", &port.to_string());
        // One pipe for both, so that the lines stay in their order.
        let (output, printed) = io::pipe().map_err(StartError::Spawn)?;
        let mut command = guardian.command(target);
        command
            .args(target.command.iter().map(with_port))
            .envs(target.env.iter().map(|(name, value)| (name, with_port(value))))
            .stdin(Stdio::piped())
            .stdout(printed.try_clone().map_err(StartError::Spawn)?)
            .stderr(printed)
            // A Ctrl-C at the terminal is for us: we stop the server when its requests are done.
            .process_group(0);
        if let Some(directory) = &target.directory {
            if !Path::new(directory).is_dir() {
                return Err(StartError::Directory(directory.clone()));
            }
            command.current_dir(directory);
        }
        let mut guardian = command.spawn().map_err(StartError::Spawn)?;
        // Our copies of the writing end go, so that reading ends with the last process that has one.
        drop(command);
        let lifeline = guardian.stdin.take();
        let output = pipe::Receiver::from_owned_fd(output.into()).map_err(StartError::Spawn)?;
        let told = gate.clone();
        let output =
            Output::read(output, gate.key().clone(), move |part| told.cold_starts().record_part(part));
        Ok(Self { guardian, lifeline, output, address: format!("{}:{port}", Ipv4Addr::LOCALHOST) })
    }

    /// Where it listens, once it does.
    pub(super) fn address(&self) -> &str {
        &self.address
    }

    /// It is ready: what it prints from now on says nothing of its start.
    pub(super) fn is_loaded(&self) {
        self.output.is_loaded();
    }

    /// Waits until it has ended by itself. Cancel-safe.
    pub(super) async fn exited(&mut self) -> io::Result<ExitStatus> {
        self.guardian.wait().await
    }

    /// Why it ended, having been `doing` something.
    pub(super) async fn end(&mut self, status: io::Result<ExitStatus>, doing: &str) -> End {
        let last_lines = self.output.rest().await;
        End { reason: reason(status, doing, &last_lines), last_lines }
    }

    /// The last lines that it printed so far.
    pub(super) fn last_lines(&self) -> Vec<String> {
        self.output.last_lines()
    }

    /// Ends it, and all that it started: SIGTERM, and SIGKILL after the time that it has.
    pub(super) async fn stop(mut self) {
        self.lifeline = None;
        let _ = self.guardian.wait().await;
    }
}

/// A port that is free, and likely to be so when the server binds it, which may take it seconds. So not one that the
/// kernel gives to connections and listeners that leave the choice to it, but one below those and Kubernetes' node ports.
fn free_port() -> io::Result<u16> {
    const TRIES: usize = 100;
    let below = iter::repeat_with(|| fastrand::u16(20_000..30_000)).take(TRIES);
    below.map(try_port).find_map(Result::ok).map_or_else(|| try_port(0), Ok)
}

/// Whether a port is free; 0 takes one that is. Without `SO_REUSEADDR`, or we would not see a server that is bound but
/// does not listen yet, as vLLM while it loads.
fn try_port(port: u16) -> io::Result<u16> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)).into())?;
    let address = socket.local_addr()?.as_socket();
    Ok(address.map_or(port, |address| address.port()))
}

fn reason(status: io::Result<ExitStatus>, doing: &str, last_lines: &[String]) -> Reason {
    let last = telling(last_lines).as_deref().map(shortened);
    let how = match status {
        Ok(status) => match (status.code(), status.signal()) {
            (Some(126 | 127), _)
                if let Some(said) =
                    last_lines.last().and_then(|line| line.strip_prefix(guardian::SPEAKER)) =>
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
        Err(error) => format!("was lost sight of ({error})"),
    };
    let brief = format!("the command {how} while {doing}");
    match last {
        Some(last) => Reason::with_output(&brief, &format!("{brief}; its last line: {last}")),
        None => format!("{brief}, without a word").into(),
    }
}

/// A line that fits into an error message.
fn shortened(line: &str) -> String {
    const LENGTH: usize = 300;
    match line.char_indices().nth(LENGTH) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_somebody_is_bound_to_is_not_free() {
        let bound = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        bound.set_reuse_address(true).unwrap();
        bound.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
        let taken = bound.local_addr().unwrap().as_socket().unwrap().port();
        assert_eq!(try_port(taken).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert!((20_000..30_000).contains(&free_port().unwrap()));
    }

    #[test]
    fn the_reason_says_how_it_ended_and_what_it_said_last() {
        let lines = |text: &str| vec![text.to_owned()];
        let code = |code: i32| Ok(ExitStatus::from_raw(code << 8));
        for (status, last, expected) in [
            (code(1), lines("no GPU"), "the command exited with code 1 while loading; its last line: no GPU"),
            (code(3), vec![], "the command exited with code 3 while loading, without a word"),
            (
                Ok(ExitStatus::from_raw(9)),
                vec![],
                "the command was killed by SIGKILL while loading, without a word",
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
            let reason = reason(status, "loading", &last);
            assert_eq!(&*reason, expected);
            let brief = expected.split("; its last line").next().unwrap();
            assert_eq!(&**reason.brief(), brief, "clients do not read what it printed");
        }
        assert_eq!(shortened(&"ä".repeat(301)).chars().count(), 301);
    }
}
