//! Programs run to their end as from a terminal, with a kubeconfig.

use std::{ffi::OsStr, path::PathBuf, process::Stdio};

use serde_json::Value;
use tokio::{io::AsyncWriteExt as _, process::Command};

use crate::{in_cluster, scenario::Scenario, wait, world};

/// Terminal of one user.
pub(crate) struct Shell {
    bin: PathBuf,
    kubeconfig: PathBuf,
    home: PathBuf,
}

/// Output and success of a program.
#[derive(Debug)]
pub(crate) struct ShellOutput {
    pub(crate) success: bool,
    pub(crate) out: String,
    pub(crate) err: String,
}

// === impl Scenario ===

impl Scenario {
    /// Returns a terminal of a user with all rights, in the scenario's namespace.
    pub(crate) fn shell(&self) -> Shell {
        self.shell_with("admin", &self.world.plane.kubeconfig("admin", Some("system:masters")))
    }

    /// Returns a terminal of a service account of the namespace.
    pub(crate) async fn shell_of(&self, account: &str) -> Shell {
        let token = in_cluster::token(&self.kube, &self.namespace, account).await;
        self.shell_with(account, &self.world.plane.kubeconfig_with_token(&token))
    }

    fn shell_with(&self, user: &str, kubeconfig: &str) -> Shell {
        let folders = &self.world.plane.folders;
        let home = folders.run.join("homes").join(format!("{}.{user}", self.namespace));
        std::fs::create_dir_all(&home).unwrap();
        let file = home.join("kubeconfig");
        let mut kubeconfig: Value = serde_json::from_str(kubeconfig).unwrap();
        kubeconfig["contexts"][0]["context"]["namespace"] = self.namespace.clone().into();
        // Another terminal of the user may be reading the file.
        let new = home.join(format!("kubeconfig.{:?}", std::thread::current().id()));
        std::fs::write(&new, kubeconfig.to_string()).unwrap();
        std::fs::rename(&new, &file).unwrap();
        Shell { bin: folders.bin.clone(), kubeconfig: file, home }
    }
}

// === impl Shell ===

impl Shell {
    /// Runs kubectl; arguments are separated by spaces.
    pub(crate) async fn kubectl(&self, arguments: &str) -> ShellOutput {
        self.run(self.bin.join("kubectl"), arguments.split_whitespace(), "").await
    }

    /// Same as [`Self::kubectl`], with standard input.
    pub(crate) async fn kubectl_with(&self, arguments: &str, input: &str) -> ShellOutput {
        self.run(self.bin.join("kubectl"), arguments.split_whitespace(), input).await
    }

    pub(crate) async fn anteroom(&self, arguments: &str) -> ShellOutput {
        self.run(world::anteroom(), arguments.split_whitespace(), "").await
    }

    pub(crate) async fn helm<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> ShellOutput {
        self.run(self.bin.join("helm"), arguments, "").await
    }

    async fn run<A: AsRef<OsStr>>(
        &self,
        program: PathBuf,
        arguments: impl IntoIterator<Item = A>,
        input: &str,
    ) -> ShellOutput {
        let mut command = Command::new(&program);
        command.args(arguments).env("KUBECONFIG", &self.kubeconfig).env("HOME", &self.home).env("TZ", "UTC");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let what = format!("the end of {command:?}");
        let ended = async {
            let mut child = command.spawn().unwrap();
            // A program that does not read its input may close it.
            let _ = child.stdin.take().unwrap().write_all(input.as_bytes()).await;
            child.wait_with_output().await.unwrap()
        };
        let output = wait::within(&what, wait::WAIT_LIMIT, ended).await;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        ShellOutput { success: output.status.success(), out: text(&output.stdout), err: text(&output.stderr) }
    }
}

// === impl ShellOutput ===

impl ShellOutput {
    /// Returns the standard output. Panics if the program failed.
    #[track_caller]
    pub(crate) fn stdout_of_success(self) -> String {
        assert!(self.success, "{}{}", self.out, self.err);
        self.out
    }

    /// Returns the standard error. Panics if the program succeeded.
    #[track_caller]
    pub(crate) fn stderr_of_failure(self) -> String {
        assert!(!self.success, "it was content: {}", self.out);
        self.err
    }

    /// Returns the words of each line.
    pub(crate) fn table(&self) -> Vec<Vec<&str>> {
        self.out.lines().map(|line| line.split_whitespace().collect()).collect()
    }
}
