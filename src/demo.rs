//! `anteroom demo`: the main job on an embedded default. Requests come in while nothing runs, are held, wake a model
//! server, and are answered; then it is told where the time went.

mod client;
mod live;
mod report;
mod show;
mod stage;
mod stay;
mod waterfall;

use std::{io, path::PathBuf, process::ExitCode, time::Duration};

use thiserror::Error;

use crate::{
    app::{Account, StartError},
    config::ConfigError,
    domain::Period,
    drain::{Request, Signals},
    output::{OutputError, OutputFile},
    terminal::{Paint, say, size},
};
use client::Clients;
use report::{Report, requests_in_words};
use show::{Show, View};
use stage::Stage;
use stay::Stay;

/// What `anteroom demo` can be told.
#[derive(Clone, Debug, clap::Args)]
pub struct DemoArgs {
    /// End after the report, with nothing left running; exits 1 when a request failed
    #[arg(long)]
    pub once: bool,

    /// Streaming requests to send at once while nothing runs
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=200))]
    pub requests: u16,

    /// Time that the model server takes to load, such as 500ms or 1m; up to 10m
    #[arg(long, value_name = "DURATION", default_value = "3s", value_parser = load_time)]
    pub load_time: Period,

    /// Write the report to this file too, as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

#[derive(Debug, Error)]
enum DemoError {
    #[error(transparent)]
    Json(#[from] OutputError),
    #[error("cannot find this program's own file, which is to play the model server: {0}")]
    Program(io::Error),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("the proxy has stopped")]
    Stopped,
    #[error("cannot handle signals: {0}")]
    Signals(io::Error),
    #[error("cannot connect to the proxy: {0}")]
    Connect(io::Error),
    #[error("cannot talk to the proxy: {0}")]
    Handshake(hyper::Error),
}

/// What the first requests brought, or who asked us to stop before.
enum Round {
    Done(Box<Report>, Account),
    Asked(Request),
}

fn load_time(text: &str) -> Result<Period, String> {
    let period: Period = text.parse()?;
    if period.get() > Duration::from_secs(600) {
        return Err("longer than 10m, which is too long for a demo".to_owned());
    }
    Ok(period)
}

/// Runs the demo.
pub async fn run(args: DemoArgs) -> ExitCode {
    match demo(args).await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {}", error.to_string().trim_end());
            ExitCode::FAILURE
        }
    }
}

async fn demo(args: DemoArgs) -> Result<ExitCode, DemoError> {
    let mut file = args.json.as_deref().map(OutputFile::open).transpose()?;
    let mut signals = Signals::new().map_err(DemoError::Signals)?;
    let stage = Stage::start(args.load_time).await?;
    let paint = Paint::for_stdout();
    introduce(&stage, &args, paint);

    let count = usize::from(args.requests);
    let mut clients = Clients::send(stage.address, count).await?;
    let mut show = Show::new(count);
    let began = clients.began;
    let round = tokio::select! {
        // Who asks us to stop does not want to wait for a report.
        biased;
        asked = signals.next() => Round::Asked(asked),
        () = clients.watch(show.every(), |seen, elapsed| show.update(&View::of(&stage), seen, elapsed)) => {
            let account = stage.settled().await;
            let report = Report::new(args.load_time, stage.last_cold_start(), clients.seen(), &account);
            Round::Done(Box::new(report), account)
        }
    };
    // Hangs up.
    drop(clients);

    let (report, account) = match round {
        Round::Done(report, account) => {
            show.finish();
            (report, account)
        }
        Round::Asked(asked) => {
            show.freeze();
            say(&format!("Interrupted: stopping, with {} held.", requests_in_words(stage.gate.held())));
            finish(stage, &mut signals).await;
            return Ok(interrupted(asked));
        }
    };
    say("");
    report.lines(&account, paint, size().0).iter().for_each(|line| say(line));
    let written = file.as_mut().map_or(Ok(()), |file| file.write_json(&report));
    if !args.once && report.problems.is_empty() && written.is_ok() {
        stay::hints(&stage, paint).iter().for_each(|line| say(line));
        let stay = Stay::new(&stage, began, paint);
        tokio::select! {
            // It never ends by itself.
            biased;
            _ = signals.next() => {}
            () = stay.watch() => {}
        }
        stay.freeze();
    }
    say("");
    let last = finish(stage, &mut signals).await;
    written?;
    for problem in &report.problems {
        eprintln!("error: {problem}");
    }
    if !last.balances() {
        eprintln!("error: after the end, the account does not balance");
    }
    let good = report.problems.is_empty() && last.balances();
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn introduce(stage: &Stage, args: &DemoArgs, paint: Paint) {
    let Stage { address, admin_address, idle_timeout, .. } = stage;
    let load_time = args.load_time;
    let ask = match args.requests {
        1 => "One client asks for a streamed answer".to_owned(),
        count => format!("{count} clients ask for a streamed answer, all at once"),
    };
    for line in [
        format!("{} {}: a cold start, end to end", paint.bold("anteroom demo"), env!("CARGO_PKG_VERSION")),
        String::new(),
        format!("  proxy  http://{address}  the OpenAI API, with one model: demo"),
        format!("  admin  http://{admin_address}  dashboard, metrics, API"),
        "  model  anteroom sim           a stand-in for vLLM, with nothing to download:".to_owned(),
        format!(
            "                                loads for {load_time}, stopped after {idle_timeout} without a request"
        ),
        String::new(),
        format!("No model server runs. {ask}."),
        String::new(),
    ] {
        say(&line);
    }
}

/// Stops everything, and says so.
async fn finish(stage: Stage, signals: &mut Signals) -> Account {
    let hurry = async {
        signals.next().await;
    };
    let account = stage.stop(hurry).await;
    say("Stopped, with nothing left running.");
    account
}

/// What a shell shows for a program that the signal ended.
fn interrupted(asked: Request) -> ExitCode {
    ExitCode::from(match asked {
        Request::Interrupt => 130,
        Request::Terminate => 143,
    })
}
