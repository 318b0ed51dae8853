//! Validation of targets.

use std::{
    env,
    net::{IpAddr, SocketAddr},
    os::unix::fs::PermissionsExt,
    path::Path,
};

use http::Uri;

use super::{ConfigChecker, allowed::allows};
use crate::{
    config::source::KeyPath,
    domain::{ProcessTarget, WhenIdle},
};

impl ConfigChecker<'_> {
    pub(super) fn process(&mut self, process: &ProcessTarget, path: &KeyPath) {
        let texts = || process.command.iter().chain(process.env.values());
        match process.command.first().map(String::as_str) {
            None | Some("") => self.error(&path.key("command"), "names no program to start"),
            Some(_) if !texts().any(|text| text.contains("{port}")) => {
                let message = "\"{port}\" is nowhere in it, nor in env: the server could not know its port; add it, \
                               as in --port \"{port}\"";
                self.misfit(&path.key("command"), &path.key("env"), message);
            }
            Some(program) => self.program(process, program, path),
        }
        if texts().any(|text| text.contains('\0')) {
            self.error(path, "has a NUL character, which no process can be given");
        }
        for name in process.env.keys() {
            if name.is_empty() || name.contains(['=', '\0']) {
                let message = format!("\"{name}\" is not the name of a variable");
                self.error(&path.key("env").key(name), message);
            }
        }
        self.process_references(process, path);
        self.at_most_a_month(&path.key("idleTimeout"), process.idle_timeout);
        self.at_most_a_month(&path.key("stopTimeout"), process.stop_timeout);
        if process.idle_timeout.get().is_zero() && process.when_idle == WhenIdle::Stop {
            let message = "is zero: the server is stopped after every request, and loads again for the next";
            self.warn(&path.key("idleTimeout"), message);
        }
        self.sleep(process, path);
    }

    /// Warns about references to variables in shell syntax, except in a command that runs a shell.
    fn process_references(&mut self, process: &ProcessTarget, path: &KeyPath) {
        const SHELLS: [&str; 7] = ["sh", "bash", "dash", "ash", "zsh", "ksh", "fish"];
        let name = |word: &String| Path::new(word).file_name()?.to_str().map(str::to_owned);
        let has_shell = process.command.iter().filter_map(name).any(|name| SHELLS.contains(&&*name));
        if !has_shell {
            for index in 0..process.command.len() {
                self.shell_reference(&path.key("command").index(index));
            }
        }
        self.shell_reference(&path.key("directory"));
        for name in process.env.keys() {
            self.shell_reference(&path.key("env").key(name));
        }
    }

    fn sleep(&mut self, process: &ProcessTarget, path: &KeyPath) {
        if !matches!(process.sleep_level, 1 | 2) {
            let message =
                format!("{} is not a level of vLLM's sleep mode; choose 1 or 2", process.sleep_level);
            self.error(&path.key("sleepLevel"), message);
        }
        if let Some(stop_after) = process.stop_after {
            self.at_most_a_month(&path.key("stopAfter"), stop_after);
        }
        if process.when_idle == WhenIdle::Stop {
            for key in ["sleepLevel", "stopAfter"].map(|key| path.key(key)) {
                if self.is_given(&key) {
                    self.warn(&key, "has no effect without whenIdle: sleep: an idle server is stopped");
                }
            }
            return;
        }
        // Only a direct call of vLLM can be checked; the commands that a script runs are unknown.
        if process.command.iter().any(|word| Path::new(word).file_name().is_some_and(|name| name == "vllm")) {
            self.vllm_sleeps(process, path);
        }
    }

    fn vllm_sleeps(&mut self, process: &ProcessTarget, path: &KeyPath) {
        const DEV_MODE: &str = "VLLM_SERVER_DEV_MODE";
        let says = |flag: &str| process.command.iter().any(|word| word.split('=').next() == Some(flag));
        let open = process.env.get(DEV_MODE).cloned().or_else(|| env::var(DEV_MODE).ok());
        let open = open.is_some_and(|value| value != "0");
        let missing = [
            (says("--enable-sleep-mode"), "the flag --enable-sleep-mode in its command"),
            (open, "VLLM_SERVER_DEV_MODE: \"1\" in its env"),
        ];
        let missing: Vec<_> = missing.into_iter().filter(|(there, _)| !there).map(|(_, what)| what).collect();
        if !missing.is_empty() {
            let message = format!("vLLM does not sleep without {}", missing.join(" and "));
            self.warn(&path.key("whenIdle"), message);
        }
        if open && !says("--host") {
            let message = "vLLM listens on every address of this machine, and in its development mode gives \
                           full control to anyone who can reach it; add --host 127.0.0.1";
            self.warn(&path.key("command"), message);
        }
    }

    /// Only warns, since the file may be checked on a different machine.
    fn program(&mut self, process: &ProcessTarget, program: &str, path: &KeyPath) {
        let directory = process.directory.as_deref().map(Path::new);
        if let Some(missing) = directory.filter(|directory| !directory.is_dir()) {
            let message = format!("there is no folder {} on this machine", missing.display());
            self.warn(&path.key("directory"), message);
        }
        let place = path.key("command").index(0);
        if program.contains('/') {
            if !executable(&directory.unwrap_or(Path::new(".")).join(program)) {
                self.warn(&place, format!("there is no program {program} on this machine"));
            }
            return;
        }
        let search =
            process.env.get("PATH").map(Into::into).or_else(|| env::var_os("PATH")).unwrap_or_default();
        if !env::split_paths(&search).any(|folder| executable(&folder.join(program))) {
            self.warn(&place, format!("the command {program} is not found on this machine's PATH"));
        }
    }

    pub(super) fn url(&mut self, url: &str, path: &KeyPath) {
        let error = match url.parse::<Uri>() {
            // This case comes first and omits the URL, which may contain a password: the message is logged.
            _ if url.contains('@') => {
                let message = "has a user in it; clients send their own credentials, write http://host:port";
                Some(message.to_owned())
            }
            Err(error) => Some(format!("\"{url}\" is not a URL ({error}); write http://host:port")),
            Ok(uri) => self.url_error(url, &uri),
        };
        if let Some(message) = error {
            self.error(path, message);
        }
    }

    fn url_error(&self, url: &str, uri: &Uri) -> Option<String> {
        let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
            return Some(format!("\"{url}\" is not a whole URL; write http://host:port"));
        };
        match scheme {
            "http" => {}
            "https" => {
                let message = "https is not supported yet; put a gateway that speaks TLS to the server in between, and \
                               name its http address here";
                return Some(message.to_owned());
            }
            _ => return Some(format!("\"{scheme}\" is not supported; write http://host:port")),
        }
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() || url.contains('#') {
            let message =
                format!("has more than an address; requests keep their own path, write http://{authority}");
            return Some(message);
        }
        let host = uri.host().unwrap_or_default();
        // The parser drops a port that is not a number from 1 to 65535.
        let port = uri.port_u16().or((authority.as_str() == host).then_some(80)).unwrap_or(0);
        if host.is_empty() || port == 0 {
            return Some(format!("\"{url}\" names no host and port to connect to; write http://host:port"));
        }
        let own = [("listen", self.config.listen), ("admin", self.config.admin)];
        let is_own = |(name, address): &(&str, SocketAddr)| {
            reaches(host, port, *address) && !self.is_faulty(&KeyPath::default().key(*name))
        };
        if let Some((name, address)) = own.into_iter().find(is_own) {
            return Some(format!("\"{url}\" is our own {name} address, {address}; name the model server"));
        }
        (self.is_in_cluster() && !allows(&self.config.kubernetes, host, port)).then(|| {
            format!(
                "\"{host}\" is not a host that routes of the cluster may name; whoever runs the proxy allows it with \
                 kubernetes.allowedHosts: [{host}], or name a `service` of this namespace instead"
            )
        })
    }
}

/// Returns whether a connection to the host and port would reach the address, without resolving names.
fn reaches(host: &str, port: u16, address: SocketAddr) -> bool {
    let ip = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    let (loopback, here) = match ip {
        Ok(ip) => (ip.is_loopback() || ip.is_unspecified(), ip == address.ip()),
        Err(_) => (host.eq_ignore_ascii_case("localhost"), false),
    };
    let wide = address.ip().is_unspecified() || (ip.is_err() && address.ip().is_loopback());
    port == address.port() && (here || (loopback && wide))
}

fn executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}
