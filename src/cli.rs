//! The command line.

mod bench;
mod connect;
mod fail;
mod generate;
mod session;
mod status;

use std::{path::PathBuf, process::ExitCode};

use clap::{CommandFactory as _, Parser, Subcommand};
use clap_complete::Shell;
use tokio::sync::mpsc;

use fail::fail;

use crate::{
    app::{self, BoundProxy, Command},
    config::{self, ConfigWatcher, LoadedConfig, LogFormat, MemoryLimit, Overrides},
    demo::{self, DemoArgs},
    drain::{Signals, StopSignal},
    guardian::{self, GuardianArgs},
    kube, scaler,
    sim::{self, SimArgs, SimError},
    telemetry,
    terminal::{self, print},
};

/// A waiting room in front of LLM serving that scales to zero without losing a request.
#[derive(Debug, Parser)]
#[command(name = "anteroom", version, propagate_version = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Subcommands,
}

#[derive(Debug, Subcommand)]
enum Subcommands {
    /// Run the proxy.
    Serve(ConfigArgs),
    /// Validate a configuration and print its effective values; exits 1 with file, line and key of an error.
    Check(ConfigArgs),
    /// Print the JSON Schema of the configuration, for completion in editors.
    Schema,
    /// Temporarily resume a paused ScaledObject.
    Session(session::SessionArgs),
    /// Print the CustomResourceDefinition of ModelRoute, for `kubectl apply -f -`.
    Crds,
    /// Show the routes of a cluster, as last reported by its proxies.
    Status(status::StatusArgs),
    /// Demonstrate a cold start end to end, without any setup.
    Demo(DemoArgs),
    /// Measure cold starts and evaluate the results.
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// Run a simulated vLLM server without a model, for demos and tests.
    Sim(SimArgs),
    /// Print the completion script of a shell.
    Completions {
        /// Shell that loads the script.
        shell: Shell,
    },
    /// Write a man page for each command.
    #[command(hide = true)]
    Man {
        /// Folder for the pages, created if missing.
        #[arg(value_name = "DIR")]
        folder: PathBuf,
    },
    /// Terminate a process group when the proxy dies.
    #[command(hide = true)]
    Guardian(GuardianArgs),
}

#[derive(Debug, clap::Args)]
struct ConfigArgs {
    /// Configuration file (YAML). Flags take precedence over environment variables, and those over the file.
    #[arg(short, long, value_name = "FILE", env = "ANTEROOM_CONFIG")]
    config: PathBuf,
    #[command(flatten)]
    overrides: Overrides,
}

/// Parses the arguments and runs the subcommand.
pub fn main() -> ExitCode {
    match Cli::parse().command {
        Subcommands::Serve(args) => run(serve(args)),
        Subcommands::Check(args) => {
            let memory = MemoryLimit::current();
            match config::check(&args.config, &args.overrides, memory.as_ref(), terminal::width()) {
                Ok(text) => {
                    print(&text);
                    ExitCode::SUCCESS
                }
                Err(error) => fail(error.report()),
            }
        }
        Subcommands::Schema => {
            print(&config::schema());
            ExitCode::SUCCESS
        }
        Subcommands::Session(args) => run(session::run(args)),
        Subcommands::Crds => {
            print(&kube::definition_yaml());
            ExitCode::SUCCESS
        }
        Subcommands::Status(args) => run(status::run(args)),
        Subcommands::Demo(args) => run(demo::run(args)),
        Subcommands::Bench(command) => run(bench::run(command)),
        Subcommands::Sim(args) => run(async {
            sim::run(args).await.map_or_else(
                |error| {
                    // A failed load has printed vLLM's traceback, whose last line must remain the last line of the
                    // output.
                    if !matches!(error, SimError::LoadFailed { .. }) {
                        eprintln!("anteroom sim: {error}");
                    }
                    ExitCode::from(error.exit_code())
                },
                |()| ExitCode::SUCCESS,
            )
        }),
        Subcommands::Completions { shell } => {
            print(&generate::completions(shell, Cli::command()));
            ExitCode::SUCCESS
        }
        Subcommands::Man { folder } => match generate::man_pages(Cli::command(), &folder) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(format!("error: cannot write man pages to {}: {error}", folder.display())),
        },
        Subcommands::Guardian(args) => guardian::run(&args),
    }
}

/// Runs a future on a runtime with two threads: control tasks must not delay the admin listener.
fn run(future: impl Future<Output = ExitCode>) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    match runtime {
        Ok(runtime) => runtime.block_on(future),
        Err(error) => fail(format!("error: cannot start: {error}")),
    }
}

async fn serve(args: ConfigArgs) -> ExitCode {
    // Created before reading the file, so that no change in between is missed.
    let watcher = ConfigWatcher::new(&args.config);
    let LoadedConfig { config, warnings, .. } = match LoadedConfig::load(&args.config, &args.overrides) {
        Ok(loaded) => loaded.fit(MemoryLimit::current().as_ref()),
        Err(error) => return fail(error.report()),
    };
    let _logs = match telemetry::init_logs(config.log.format == LogFormat::Json) {
        Ok(logs) => logs,
        Err(error) => return fail(format!("error: cannot start the thread that writes the log: {error}")),
    };
    let reporting = tokio::spawn(telemetry::report_missing_lines());
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    let options = scaler::Options { open_files: app::raise_file_limit(), ..scaler::Options::default() };
    let bound = match BoundProxy::new(config, options).await {
        Ok(bound) => bound,
        Err(error) => return fail(format!("error: {error}")),
    };
    let signals = match Signals::new() {
        Ok(signals) => signals,
        Err(error) => return fail(format!("error: cannot handle signals: {error}")),
    };
    let (commands, received) = mpsc::channel(4);
    let stopping = tokio::spawn(forward_signals(signals, commands.clone()));
    let reloading = tokio::spawn(async move {
        match watcher {
            Ok(watcher) => reload(watcher, args, commands).await,
            Err(error) => tracing::warn!(%error, "cannot watch the configuration; changes need a restart"),
        }
    });
    bound.run(received).await;
    stopping.abort();
    reloading.abort();
    reporting.abort();
    ExitCode::SUCCESS
}

async fn forward_signals(mut signals: Signals, commands: mpsc::Sender<Command>) {
    loop {
        let request: StopSignal = signals.next().await;
        if commands.send(Command::Stop(request)).await.is_err() {
            return;
        }
    }
}

async fn reload(mut watcher: ConfigWatcher, args: ConfigArgs, commands: mpsc::Sender<Command>) {
    loop {
        let loaded = match watcher.changed().await {
            Some(content) => LoadedConfig::from_content(content, &args.config, &args.overrides),
            None => LoadedConfig::load(&args.config, &args.overrides),
        };
        match loaded.map(|loaded| loaded.fit(MemoryLimit::current().as_ref())) {
            Ok(LoadedConfig { config, warnings, .. }) => {
                for warning in warnings {
                    tracing::warn!("{warning}");
                }
                if commands.send(Command::Reload(Box::new(config))).await.is_err() {
                    return;
                }
            }
            Err(error) => tracing::error!(%error, "invalid configuration; keeping the previous one"),
        }
    }
}
