//! `anteroom session`: a paused ScaledObject scales for some time.

mod text;

use std::process::ExitCode;

use clap::{Args, Subcommand};
use kube::Client;

use super::connect::connect;
use crate::{
    domain::Period,
    kube::session::{Clock, SessionError, Sessions, check_period},
};

/// Let a paused ScaledObject scale for some time: it is paused again at the end, also when nobody is there any more.
#[derive(Debug, Args)]
pub struct SessionArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Resume autoscaling now and pause it again after some time. Again: until then from now on.
    ///
    /// The end is an annotation of the ScaledObject, and every Anteroom that serves its namespace sees to it. Where
    /// GitOps keeps the ScaledObject, it will put back what it knows, unless it is told to ignore annotations.
    Start {
        /// The ScaledObject.
        name: String,
        /// How long, such as 2h or 45m; at most 30 days.
        #[arg(long = "for", value_name = "TIME")]
        period: Period,
        /// At the end scale to zero, too. Without it, what runs then goes on running.
        #[arg(long)]
        to_zero: bool,
        #[command(flatten)]
        place: Place,
    },
    /// Say how long sessions still run.
    Status {
        /// The ScaledObject. Default: all that have a session.
        name: Option<String>,
        /// Look in all namespaces.
        #[arg(short = 'A', long, conflicts_with_all = ["namespace", "name"])]
        all_namespaces: bool,
        #[command(flatten)]
        place: Place,
    },
    /// End a session now: autoscaling is paused again.
    Stop {
        /// The ScaledObject.
        name: String,
        /// Scale to zero, too.
        #[arg(long)]
        to_zero: bool,
        #[command(flatten)]
        place: Place,
    },
}

#[derive(Debug, Args)]
struct Place {
    /// The namespace. Default: that of the kubeconfig's context.
    #[arg(short, long)]
    namespace: Option<String>,
    /// The context of the kubeconfig. Default: the current one.
    #[arg(long)]
    context: Option<String>,
}

/// Does what the arguments say and prints what was done.
pub async fn run(args: SessionArgs) -> ExitCode {
    match answer(args.command).await {
        Ok(text) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => super::fail(format!("error: {error}")),
    }
}

async fn answer(command: Command) -> Result<String, String> {
    let place = match &command {
        Command::Start { place, .. } | Command::Status { place, .. } | Command::Stop { place, .. } => place,
    };
    if let Command::Start { period, .. } = &command {
        // Before anything is asked of a cluster.
        check_period(*period).map_err(|error| error.to_string())?;
    }
    let client = connect(place.context.as_deref()).await?;
    let namespace = place.namespace.clone().unwrap_or_else(|| client.default_namespace().to_owned());
    told(command, client, namespace).await.map_err(|error| error.to_string())
}

async fn told(command: Command, client: Client, namespace: String) -> Result<String, SessionError> {
    let clock = Clock::of_server(&client).await.unwrap_or_else(Clock::of_machine);
    let sessions = Sessions::new(client, namespace);
    match command {
        Command::Start { name, period, to_zero, .. } => {
            let (before, session) = sessions.start(&name, period, to_zero, &clock).await?;
            Ok(text::started(&before, &session, clock.now()))
        }
        Command::Status { name: Some(name), .. } => {
            Ok(text::status(&sessions.get(&name).await?, clock.now()))
        }
        Command::Status { all_namespaces: true, .. } => {
            Ok(text::table(&sessions.list_everywhere().await?, clock.now(), None))
        }
        Command::Status { .. } => {
            Ok(text::table(&sessions.list().await?, clock.now(), Some(sessions.namespace())))
        }
        Command::Stop { name, to_zero, .. } => {
            let (before, session) = sessions.stop(&name, to_zero).await?;
            Ok(text::stopped(&before, session.as_ref()))
        }
    }
}

#[cfg(test)]
mod tests;
