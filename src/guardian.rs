//! The guardian: a small process between the proxy and a model server, so that no way in which the proxy ends leaves
//! the server, or anything that it started, behind.
//!
//! The proxy holds the other end of the guardian's standard input, writes nothing to it, and closes it to have the
//! command stopped. The kernel closes it too when the proxy is killed. The guardian ends as the command did, with its
//! exit code or by its signal, once everything that the command started is gone. Until then it holds a lock, which a
//! guardian of the proxy's next life waits for: two model servers might not fit on the machine.

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

/// What the guardian's own lines on standard error begin with.
pub(crate) const SPEAKER: &str = "anteroom guardian: ";

/// What `anteroom guardian` is told.
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
    #[error("standard input must be a pipe, held by whoever wants the command: {0}")]
    Lifeline(io::Error),
    #[error("cannot watch over a process: {0}")]
    Setup(io::Error),
}

/// How the command ended.
#[derive(Clone, Copy)]
enum Ended {
    Code(i32),
    Signal(i32),
}

/// The command and all that came of it.
struct Family {
    /// The command, and the id of its process group.
    leader: Pid,
    /// Set once the leader has been reaped.
    ended: Option<Ended>,
    /// Tells that a child of ours has ended.
    deaths: unix::Signal,
}

/// A name that one process of this machine has at a time, for as long as it runs.
struct Lock(#[expect(dead_code, reason = "held for its name")] std::os::unix::net::UnixListener);

/// Runs the command, and ends as it did.
pub fn run(args: &GuardianArgs) -> ExitCode {
    let ended = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(GuardianError::Setup)
        .and_then(|runtime| runtime.block_on(guard(args)));
    match ended {
        Ok(ended) => ended.repeat(),
        Err(error) => {
            say(&error);
            ExitCode::from(error.exit_code())
        }
    }
}

async fn guard(args: &GuardianArgs) -> Result<Ended, GuardianError> {
    let stdin = rustix::stdio::stdin().try_clone_to_owned().map_err(GuardianError::Lifeline)?;
    let mut lifeline = pipe::Receiver::from_owned_fd(stdin).map_err(GuardianError::Lifeline)?;
    // Only the pipe ends us. The handlers stay, and do nothing: an ignored signal would be so for the command too.
    for deaf_to in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()] {
        drop(signal(deaf_to).map_err(GuardianError::Setup)?);
    }
    let stop_timeout = Duration::from_millis(args.stop_timeout);
    // Held to the end: until everything that the command started is gone.
    let _lock = match &args.lock {
        Some(name) => tokio::select! {
            lock = Lock::acquire(name, stop_timeout + Family::DYING) => lock,
            () = closed(&mut lifeline) => return Ok(Ended::Code(0)),
        },
        None => None,
    };
    if let Some(files) = args.open_files {
        let limit = Rlimit { current: Some(files), ..getrlimit(Resource::Nofile) };
        setrlimit(Resource::Nofile, limit).map_err(|error| GuardianError::Setup(error.into()))?;
    }
    let mut family = Family::start(&args.command)?;
    tokio::select! {
        // The command's own end first: how it ended is more than that it was told to.
        biased;
        () = family.leader_ended() => {}
        () = closed(&mut lifeline) => family.stop(stop_timeout).await,
    }
    family.kill().await;
    Ok(family.ended.unwrap_or(Ended::Signal(Signal::KILL.as_raw())))
}

/// Waits until nobody holds the other end.
async fn closed(lifeline: &mut pipe::Receiver) {
    let mut ignored = [0; 64];
    while lifeline.read(&mut ignored).await.is_ok_and(|count| count > 0) {}
}

// === impl Lock ===

impl Lock {
    const RETRY_INTERVAL: Duration = Duration::from_millis(50);

    /// Waits for the name, at most as long as the guardian that has it may take to stop its command. `None` where it
    /// cannot be had, and the command is started without it: a lock that fails must not keep a model server down.
    async fn acquire(name: &str, limit: Duration) -> Option<Self> {
        match Self::try_acquire(name) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            acquired => return acquired.ok(),
        }
        say("waiting for an earlier model server of this route to stop");
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
            say("an earlier model server of this route does not stop: starting beside it");
        }
        lock
    }

    /// Binds an abstract socket: the kernel keeps its name unique in the network namespace, where the proxy's listen
    /// address is unique, too, and frees it with the process. There is no file to be left behind.
    #[cfg(target_os = "linux")]
    fn try_acquire(name: &str) -> io::Result<Self> {
        use std::os::{linux::net::SocketAddrExt as _, unix::net::SocketAddr};
        // A name has at most 107 bytes: of a longer one, a hash.
        let hashed = (name.len() > 100).then(|| {
            let mut hasher = std::hash::DefaultHasher::new();
            name.hash(&mut hasher);
            format!("anteroom/{:016x}", hasher.finish())
        });
        let address = SocketAddr::from_abstract_name(hashed.as_deref().unwrap_or(name))?;
        std::os::unix::net::UnixListener::bind_addr(&address).map(Self)
    }

    /// There are no such names elsewhere.
    #[cfg(not(target_os = "linux"))]
    fn try_acquire(_: &str) -> io::Result<Self> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Writes a line of the guardian's own. Not `eprintln!`, which panics when the reader has gone.
fn say(line: impl std::fmt::Display) {
    let _ = writeln!(io::stderr(), "{SPEAKER}{line}");
}

// === impl Family ===

impl Family {
    /// How often it is looked after processes whose end no signal tells of: those that are not our children.
    const LOOK: Duration = Duration::from_millis(50);
    /// How long a killed process may take to go. One that hangs in the kernel (a driver) may never do.
    const DYING: Duration = Duration::from_secs(10);

    fn start(command: &[OsString]) -> Result<Self, GuardianError> {
        let deaths = signal(SignalKind::child()).map_err(GuardianError::Setup)?;
        // Whatever loses its parent becomes our child, even if it has left the group.
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
        Ok(Self { leader, ended: None, deaths })
    }

    /// Takes the status of every child that has ended. Says whether any is left.
    fn reap(&mut self) -> bool {
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) if pid == self.leader => self.ended = Ended::from_status(status),
                Ok(Some(_)) | Err(Errno::INTR) => {}
                Ok(None) => return true,
                Err(_) => return false,
            }
        }
    }

    /// Cancel-safe.
    async fn leader_ended(&mut self) {
        loop {
            self.reap();
            if self.ended.is_some() {
                return;
            }
            self.deaths.recv().await;
        }
    }

    /// Asks the group to end, and gives it until `grace` is over. A shell may be gone long before what it runs.
    async fn stop(&mut self, grace: Duration) {
        let _ = kill_process_group(self.leader, Signal::TERM);
        let gone = async {
            loop {
                self.reap();
                if self.ended.is_some() && test_kill_process_group(self.leader).is_err() {
                    return;
                }
                let _ = timeout(Self::LOOK, self.deaths.recv()).await;
            }
        };
        let _ = timeout(grace, gone).await;
    }

    /// Ends what is left: the group, and on Linux whoever left the group as well.
    async fn kill(&mut self) {
        let _ = kill_process_group(self.leader, Signal::KILL);
        let gone = async {
            while self.reap() {
                for orphan in orphans() {
                    let _ = kill_process(orphan, Signal::KILL);
                }
                let _ = timeout(Self::LOOK, self.deaths.recv()).await;
            }
        };
        if timeout(Self::DYING, gone).await.is_err() {
            say("something does not die even of SIGKILL");
        }
    }
}

/// Our children: besides the command, all that it left behind. Empty where the kernel does not tell.
fn orphans() -> Vec<Pid> {
    let children = std::fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
    children.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect()
}

// === impl Ended ===

impl Ended {
    fn from_status(status: WaitStatus) -> Option<Self> {
        let code = status.exit_status().map(Self::Code);
        code.or_else(|| status.terminating_signal().map(Self::Signal))
    }

    /// Ends this process in the same way. A core of ours would tell nothing, so none is written.
    fn repeat(self) -> ExitCode {
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
    /// As shells do it.
    fn exit_code(&self) -> u8 {
        match self {
            Self::Run { source, .. } if source.kind() == io::ErrorKind::NotFound => 127,
            _ => 126,
        }
    }
}
