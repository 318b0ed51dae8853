//! `anteroom session`: temporarily resumes a paused ScaledObject.

mod text;

use std::process::ExitCode;

use clap::{Args, Subcommand};
use kube::Client;

use super::connect::connect;
use crate::{
    domain::Period,
    kube::session::{ApiServerClock, SessionError, Sessions, check_period},
    terminal::print,
};

/// Temporarily resume a paused ScaledObject. Anteroom pauses it again at the end of the session.
#[derive(Debug, Args)]
pub struct SessionArgs {
    #[command(subcommand)]
    command: SessionCommand,
}

#[derive(Debug, Subcommand)]
enum SessionCommand {
    /// Resume autoscaling and pause it again after a period. Replaces the end of a running session.
    ///
    /// The end is stored in an annotation of the ScaledObject and enforced by every Anteroom that serves its namespace. If
    /// GitOps manages the ScaledObject, configure it to ignore annotations; otherwise it ends the session early.
    Start {
        /// Name of the ScaledObject.
        name: String,
        /// Length of the session, such as 2h or 45m; at most 30 days.
        #[arg(long = "for", value_name = "TIME")]
        period: Period,
        /// Also scale to zero at the end. By default replicas keep running.
        #[arg(long)]
        to_zero: bool,
        #[command(flatten)]
        scope: KubeScope,
    },
    /// Show sessions and their end.
    Status {
        /// Name of the ScaledObject. Default: all with a session.
        name: Option<String>,
        /// Show all namespaces.
        #[arg(short = 'A', long, conflicts_with_all = ["namespace", "name"])]
        all_namespaces: bool,
        #[command(flatten)]
        scope: KubeScope,
    },
    /// End a session and pause autoscaling.
    Stop {
        /// Name of the ScaledObject.
        name: String,
        /// Also scale to zero.
        #[arg(long)]
        to_zero: bool,
        #[command(flatten)]
        scope: KubeScope,
    },
}

#[derive(Debug, Args)]
struct KubeScope {
    /// Namespace. Default: that of the kubeconfig's context.
    #[arg(short, long)]
    namespace: Option<String>,
    /// Context of the kubeconfig. Default: the current one.
    #[arg(long)]
    context: Option<String>,
}

/// Runs `anteroom session`.
pub async fn run(args: SessionArgs) -> ExitCode {
    match execute(args.command).await {
        Ok(text) => {
            print(&text);
            ExitCode::SUCCESS
        }
        Err(error) => super::fail::fail(format!("error: {error}")),
    }
}

async fn execute(command: SessionCommand) -> Result<String, String> {
    let scope = match &command {
        SessionCommand::Start { scope, .. }
        | SessionCommand::Status { scope, .. }
        | SessionCommand::Stop { scope, .. } => scope,
    };
    if let SessionCommand::Start { period, .. } = &command {
        // Checked before connecting to a cluster.
        check_period(*period).map_err(|error| error.to_string())?;
    }
    let client = connect(scope.context.as_deref()).await?;
    let namespace = scope.namespace.clone().unwrap_or_else(|| client.default_namespace().to_owned());
    run_command(command, client, namespace).await.map_err(|error| error.to_string())
}

async fn run_command(
    command: SessionCommand,
    client: Client,
    namespace: String,
) -> Result<String, SessionError> {
    let clock = ApiServerClock::of_server(&client).await.unwrap_or_else(ApiServerClock::of_machine);
    let sessions = Sessions::new(client, namespace);
    match command {
        SessionCommand::Start { name, period, to_zero, .. } => {
            let (before, session) = sessions.start(&name, period, to_zero, &clock).await?;
            Ok(text::started(&before, &session, clock.now()))
        }
        SessionCommand::Status { name: Some(name), .. } => {
            Ok(text::status(&sessions.get(&name).await?, clock.now()))
        }
        SessionCommand::Status { all_namespaces: true, .. } => {
            Ok(text::table(&sessions.list_everywhere().await?, clock.now(), None))
        }
        SessionCommand::Status { .. } => {
            Ok(text::table(&sessions.list().await?, clock.now(), Some(sessions.namespace())))
        }
        SessionCommand::Stop { name, to_zero, .. } => {
            let (before, session) = sessions.stop(&name, to_zero).await?;
            Ok(text::stopped(&before, session.as_ref()))
        }
    }
}

#[cfg(test)]
mod tests;
