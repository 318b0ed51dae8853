//! `anteroom demo`: a cold start with an embedded configuration. Sends requests while no model server runs and reports the
//! time of each phase.

mod client;
mod error;
mod live;
mod proxy;
mod report;
mod show;
mod view;
mod watch;
mod waterfall;

use std::{path::PathBuf, process::ExitCode, time::Duration};

use crate::{
    app::Account,
    domain::Period,
    drain::{Signals, StopSignal},
    output::OutputFile,
    terminal::{Paint, say, size},
};
use client::DemoClients;
use error::DemoError;
use proxy::DemoProxy;
use report::{DemoReport, request_count};
use show::BurstDisplay;
use view::RouteView;
use watch::RouteWatch;

/// Arguments of `anteroom demo`.
#[derive(Clone, Debug, clap::Args)]
pub struct DemoArgs {
    /// Exit after the report and stop everything; exits 1 if a request failed
    #[arg(long)]
    pub once: bool,

    /// Number of concurrent streaming requests
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=200))]
    pub requests: u16,

    /// Load time of the model server, such as 500ms or 1m; at most 10m
    #[arg(long, value_name = "DURATION", default_value = "3s", value_parser = load_time)]
    pub load_time: Period,

    /// Also write the report to this file as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// Result of the first burst.
enum BurstResult {
    Finished(Box<DemoReport>, Account),
    Interrupted(StopSignal),
}

fn load_time(text: &str) -> Result<Period, String> {
    let period: Period = text.parse()?;
    if period.get() > Duration::from_secs(600) {
        return Err("at most 10m, longer is too long for a demo".to_owned());
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
    let proxy = DemoProxy::start(args.load_time).await?;
    let paint = Paint::for_stdout();
    introduce(&proxy, &args, paint);

    let count = usize::from(args.requests);
    let mut clients = DemoClients::send(proxy.address, count).await?;
    let mut show = BurstDisplay::new(count);
    let began = clients.began;
    let result = tokio::select! {
        // Biased: a signal ends the demo without a report.
        biased;
        request = signals.next() => BurstResult::Interrupted(request),
        () = clients.watch(show.interval(), |clients, elapsed| show.update(&RouteView::of(&proxy), clients, elapsed)) => {
            let account = proxy.settled().await;
            let report = DemoReport::new(args.load_time, proxy.last_cold_start(), clients.snapshot(), &account);
            BurstResult::Finished(Box::new(report), account)
        }
    };
    // Closes the connections.
    drop(clients);

    let (report, account) = match result {
        BurstResult::Finished(report, account) => {
            show.finish();
            (report, account)
        }
        BurstResult::Interrupted(request) => {
            show.freeze();
            say(&format!("Interrupted with {} held; stopping.", request_count(proxy.gate.held())));
            shut_down(proxy, &mut signals).await;
            return Ok(signal_exit_code(request));
        }
    };
    say("");
    report.lines(&account, paint, size().0).iter().for_each(|line| say(line));
    let written = file.as_mut().map_or(Ok(()), |file| file.write_json(&report));
    if !args.once && report.problems.is_empty() && written.is_ok() {
        watch::hints(&proxy, paint).iter().for_each(|line| say(line));
        let watch = RouteWatch::new(&proxy, began, paint);
        tokio::select! {
            // Biased, so that a signal takes precedence.
            biased;
            _ = signals.next() => {}
            () = watch.watch() => {}
        }
        watch.freeze();
    }
    say("");
    let last = shut_down(proxy, &mut signals).await;
    written?;
    for problem in &report.problems {
        eprintln!("error: {problem}");
    }
    if !last.balances() {
        eprintln!("error: the request counts do not add up after the shutdown");
    }
    let good = report.problems.is_empty() && last.balances();
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn introduce(proxy: &DemoProxy, args: &DemoArgs, paint: Paint) {
    let DemoProxy { address, admin_address, idle_timeout, .. } = proxy;
    let load_time = args.load_time;
    let ask = match args.requests {
        1 => "One client requests a streamed answer".to_owned(),
        count => format!("{count} clients request streamed answers concurrently"),
    };
    for line in [
        format!("{} {}: a cold start, end to end", paint.bold("anteroom demo"), env!("CARGO_PKG_VERSION")),
        String::new(),
        format!("  proxy  http://{address}  OpenAI API with one model, demo"),
        format!("  admin  http://{admin_address}  dashboard, metrics, API"),
        "  model  anteroom sim           simulated vLLM server without a model:".to_owned(),
        format!("         load time {load_time}, stopped after {idle_timeout} without a request"),
        String::new(),
        format!("No model server is running. {ask}."),
        String::new(),
    ] {
        say(&line);
    }
}

/// Stops everything and reports it.
async fn shut_down(proxy: DemoProxy, signals: &mut Signals) -> Account {
    let second_signal = async {
        signals.next().await;
    };
    let account = proxy.stop(second_signal).await;
    say("Stopped; nothing is left running.");
    account
}

/// Returns the exit code for a signal: 128 plus its number.
fn signal_exit_code(request: StopSignal) -> ExitCode {
    ExitCode::from(match request {
        StopSignal::Interrupt => 130,
        StopSignal::Terminate => 143,
    })
}
