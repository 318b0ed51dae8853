//! The guardian: a small process between the proxy and a model server. It stops the server and all of its children,
//! however the proxy exits.
//!
//! The proxy holds the other end of the guardian's standard input, writes nothing, and closes it to stop the command; the
//! kernel closes it if the proxy is killed. The guardian exits as the command did, with its code or by its signal, once all
//! processes of the command are gone. Until then it holds a lock, which the guardian of a restarted proxy waits for: two
//! model servers might not fit on the machine.

use std::{
    ffi::OsString,
    hash::{Hash as _, Hasher as _},
    io::{self, Write as _},
    os::unix::process::CommandExt as _,
    process::{Command, ExitCode, Stdio},
    time::Duration,
};

use rustix::{
    io::Errno,
    process::{
        Pid, Resource, Rlimit, Signal, WaitOptions, WaitStatus, getrlimit, kill_process, kill_process_group,
        setrlimit, test_kill_process_group, wait,
    },
};
use tokio::{
    io::AsyncReadExt as _,
    net::unix::pipe,
    runtime,
    signal::unix::{self, SignalKind, signal},
    time::{sleep, timeout},
};

/// Prefix of the guardian's own lines on standard error.
pub(crate) const LOG_PREFIX: &str = "anteroom guardian: ";

/// Arguments of `anteroom guardian`.
#[derive(Clone, Debug, clap::Args)]
pub struct GuardianArgs {
    /// Time between SIGTERM and SIGKILL, in milliseconds
    #[arg(long, value_name = "MS")]
    pub stop_timeout: u64,
    /// Soft limit of open files for the command
    #[arg(long, value_name = "NUMBER")]
    pub open_files: Option<u64>,
    /// Name that only one guardian of this machine may have at a time; the others wait for it
    #[arg(long, value_name = "NAME")]
    pub lock: Option<String>,
    /// The command and its arguments
    #[arg(last = true, required = true)]
    pub command: Vec<OsString>,
}

#[derive(Debug, thiserror::Error)]
enum GuardianError {
    #[error("cannot run `{}`: {source}", .program.display())]
    Run { program: OsString, source: io::Error },
    #[error("standard input must be a pipe from the parent process: {0}")]
    Lifeline(io::Error),
    #[error("cannot supervise a process: {0}")]
    Setup(io::Error),
}

/// Exit code or signal of the command.
#[derive(Clone, Copy)]
enum CommandExit {
    Code(i32),
    Signal(i32),
}

/// The command and its descendants.
struct ProcessTree {
    /// Pid of the command, and id of its process group.
    leader: Pid,
    /// Set once the leader has been reaped.
    ended: Option<CommandExit>,
    /// Receives SIGCHLD.
    child_exits: unix::Signal,
}

/// Machine-wide lock by name, released by the kernel when the process ends.
struct Lock(#[expect(dead_code, reason = "holds the name")] std::os::unix::net::UnixListener);

/// Runs the command, and exits as it did.
pub fn run(args: &GuardianArgs) -> ExitCode {
    let ended = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(GuardianError::Setup)
        .and_then(|runtime| runtime.block_on(guard(args)));
    match ended {
        Ok(ended) => ended.exit_like_command(),
        Err(error) => {
            log(&error);
            ExitCode::from(error.exit_code())
        }
    }
}

async fn guard(args: &GuardianArgs) -> Result<CommandExit, GuardianError> {
    let stdin = rustix::stdio::stdin().try_clone_to_owned().map_err(GuardianError::Lifeline)?;
    let mut lifeline = pipe::Receiver::from_owned_fd(stdin).map_err(GuardianError::Lifeline)?;
    // Only the pipe stops the guardian. Empty handlers instead of ignored signals, which the command would inherit.
    for ignored in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()] {
        drop(signal(ignored).map_err(GuardianError::Setup)?);
    }
    let stop_timeout = Duration::from_millis(args.stop_timeout);
    // Held until all processes of the command are gone.
    let _lock = match &args.lock {
        Some(name) => tokio::select! {
            lock = Lock::acquire(name, stop_timeout + ProcessTree::KILL_TIMEOUT) => lock,
            () = lifeline_closed(&mut lifeline) => return Ok(CommandExit::Code(0)),
        },
        None => None,
    };
    if let Some(files) = args.open_files {
        let limit = Rlimit { current: Some(files), ..getrlimit(Resource::Nofile) };
        setrlimit(Resource::Nofile, limit).map_err(|error| GuardianError::Setup(error.into()))?;
    }
    let mut family = ProcessTree::start(&args.command)?;
    tokio::select! {
        // Polls the exit of the command first: its status is lost if the guardian stops it instead.
        biased;
        () = family.leader_ended() => {}
        () = lifeline_closed(&mut lifeline) => family.stop(stop_timeout).await,
    }
    family.kill().await;
    Ok(family.ended.unwrap_or(CommandExit::Signal(Signal::KILL.as_raw())))
}

/// Waits until the proxy closes its end of the pipe.
async fn lifeline_closed(lifeline: &mut pipe::Receiver) {
    let mut ignored = [0; 64];
    while lifeline.read(&mut ignored).await.is_ok_and(|count| count > 0) {}
}

// === impl Lock ===

impl Lock {
    const RETRY_INTERVAL: Duration = Duration::from_millis(50);

    /// Waits for the lock, at most as long as its holder may take to stop its command. Returns `None` on failure: the command
    /// starts without the lock rather than not at all.
    async fn acquire(name: &str, limit: Duration) -> Option<Self> {
        match Self::try_acquire(name) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            acquired => return acquired.ok(),
        }
        log("waiting for an earlier model server of this route to stop");
        let free = async {
            loop {
                sleep(Self::RETRY_INTERVAL).await;
                if let Ok(lock) = Self::try_acquire(name) {
                    return lock;
                }
            }
        };
        let lock = timeout(limit, free).await.ok();
        if lock.is_none() {
            log("an earlier model server of this route does not stop; starting beside it");
        }
        lock
    }

    /// Binds an abstract socket, whose name is unique in the network namespace, as is the proxy's listen address. The kernel
    /// frees it with the process, and no file is left behind.
    #[cfg(target_os = "linux")]
    fn try_acquire(name: &str) -> io::Result<Self> {
        use std::os::{linux::net::SocketAddrExt as _, unix::net::SocketAddr};
        // A name has at most 107 bytes; a longer one is hashed.
        let hashed = (name.len() > 100).then(|| {
            let mut hasher = std::hash::DefaultHasher::new();
            name.hash(&mut hasher);
            format!("anteroom/{:016x}", hasher.finish())
        });
        let address = SocketAddr::from_abstract_name(hashed.as_deref().unwrap_or(name))?;
        std::os::unix::net::UnixListener::bind_addr(&address).map(Self)
    }

    /// Abstract sockets exist only on Linux.
    #[cfg(not(target_os = "linux"))]
    fn try_acquire(_: &str) -> io::Result<Self> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Writes a line to standard error. Not with `eprintln!`, which panics when the pipe is closed.
fn log(line: impl std::fmt::Display) {
    let _ = writeln!(io::stderr(), "{LOG_PREFIX}{line}");
}

// === impl ProcessTree ===

impl ProcessTree {
    /// Interval of checks for processes that are not our children, whose end sends no SIGCHLD.
    const CHECK_INTERVAL: Duration = Duration::from_millis(50);
    /// Time for killed processes to exit. One that hangs in a driver may never do so.
    const KILL_TIMEOUT: Duration = Duration::from_secs(10);

    fn start(command: &[OsString]) -> Result<Self, GuardianError> {
        let deaths = signal(SignalKind::child()).map_err(GuardianError::Setup)?;
        // Orphaned descendants become our children, even if they have left the group.
        #[cfg(target_os = "linux")]
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
            .map_err(|error| GuardianError::Setup(error.into()))?;
        let (program, arguments) = command.split_first().ok_or_else(|| GuardianError::Run {
            program: OsString::new(),
            source: io::ErrorKind::NotFound.into(),
        })?;
        let leader = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .process_group(0)
            .spawn()
            .map(|child| Pid::from_child(&child))
            .map_err(|source| GuardianError::Run { program: program.clone(), source })?;
        Ok(Self { leader, ended: None, child_exits: deaths })
    }

    /// Reaps all children that have exited. Returns true if any is left.
    fn reap(&mut self) -> bool {
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) if pid == self.leader => {
                    self.ended = CommandExit::from_status(status)
                }
                Ok(Some(_)) | Err(Errno::INTR) => {}
                Ok(None) => return true,
                Err(_) => return false,
            }
        }
    }

    /// Waits for the exit of the command. Cancel-safe.
    async fn leader_ended(&mut self) {
        loop {
            self.reap();
            if self.ended.is_some() {
                return;
            }
            self.child_exits.recv().await;
        }
    }

    /// Sends SIGTERM to the group and waits up to `grace` for all of its processes: a shell may exit long before its
    /// children.
    async fn stop(&mut self, grace: Duration) {
        let _ = kill_process_group(self.leader, Signal::TERM);
        let gone = async {
            loop {
                self.reap();
                if self.ended.is_some() && test_kill_process_group(self.leader).is_err() {
                    return;
                }
                let _ = timeout(Self::CHECK_INTERVAL, self.child_exits.recv()).await;
            }
        };
        let _ = timeout(grace, gone).await;
    }

    /// Kills the group, and on Linux also descendants that have left it.
    async fn kill(&mut self) {
        let _ = kill_process_group(self.leader, Signal::KILL);
        let gone = async {
            while self.reap() {
                for orphan in orphans() {
                    let _ = kill_process(orphan, Signal::KILL);
                }
                let _ = timeout(Self::CHECK_INTERVAL, self.child_exits.recv()).await;
            }
        };
        if timeout(Self::KILL_TIMEOUT, gone).await.is_err() {
            log("a process does not exit after SIGKILL");
        }
    }
}

/// Returns our children: the command and its orphaned descendants. Empty where the kernel does not list them.
fn orphans() -> Vec<Pid> {
    let children = std::fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
    children.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect()
}

// === impl CommandExit ===

impl CommandExit {
    fn from_status(status: WaitStatus) -> Option<Self> {
        let code = status.exit_status().map(Self::Code);
        code.or_else(|| status.terminating_signal().map(Self::Signal))
    }

    /// Ends the guardian with the exit code or signal of the command, without a core dump.
    fn exit_like_command(self) -> ExitCode {
        match self {
            Self::Code(code) => ExitCode::from(code as u8),
            Self::Signal(signal) => {
                let _ = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
                let _ = signal_hook::low_level::emulate_default_handler(signal);
                ExitCode::from(128 + signal as u8)
            }
        }
    }
}

// === impl GuardianError ===

impl GuardianError {
    /// Returns the exit code that a shell would use.
    fn exit_code(&self) -> u8 {
        match self {
            Self::Run { source, .. } if source.kind() == io::ErrorKind::NotFound => 127,
            _ => 126,
        }
    }
}
