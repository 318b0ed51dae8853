//! `anteroom bench cold-start`: cycles of waiting for zero, a burst, and the record of what it caused.

mod admin;
mod args;
mod arrivals;
mod cycle;
mod progress;
mod prompts;
mod request;
mod stage;
mod zero;

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, SystemTime},
};

use tokio::time::{Instant, sleep};

use self::{
    admin::Admins,
    arrivals::Arrivals,
    cycle::Burst,
    progress::Progress,
    prompts::{Asking, Prompts},
    stage::{Script, Stage},
    zero::Zero,
};
use super::{
    html,
    http::Base,
    results::{Cycle, Machine, Run, SCHEMA, Settings, Verdict},
    stats::Bootstrap,
    summary::Summary,
    table,
};
use crate::{
    drain::{Request, Signals},
    output::OutputFile,
    terminal::{Paint, say},
};
pub use args::ColdStartArgs;

/// Everything that cycles need, found to be there.
struct Bench {
    admins: Admins,
    burst: Burst,
    zero: Zero,
    pause: Duration,
    cycles: usize,
}

/// Why no more cycles were measured.
enum End {
    AllDone,
    Asked(Request),
    Aborted(String),
}

/// Measures, and tells what it found.
pub async fn run(args: ColdStartArgs) -> ExitCode {
    match measure(&args).await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {}", error.trim_end());
            ExitCode::from(2)
        }
    }
}

async fn measure(args: &ColdStartArgs) -> Result<ExitCode, String> {
    let text = |error: crate::output::OutputError| error.to_string();
    let inputs = Inputs::read(args)?;
    let open = |path: &Option<PathBuf>| path.as_deref().map(OutputFile::open).transpose();
    let (json, html) = (open(&args.json).map_err(text)?, open(&args.html).map_err(text)?);
    let mut signals = Signals::new().map_err(|error| format!("cannot handle signals: {error}"))?;
    let script = match (&args.url, &args.config) {
        (Some(_), _) => None,
        (None, Some(file)) => Some(Script::read(file, args.route.as_deref())?),
        (None, None) => Some(Script::stand_in(args.load_time)?),
    };
    let stage = match script.clone() {
        Some(script) => Some(script.start(args.idle()).await?),
        None => None,
    };
    let measured = measured(args, inputs, script.as_ref(), stage.as_ref(), &mut signals).await;
    if let Some(stage) = stage {
        let hurry = async {
            signals.next().await;
        };
        stage.stop(hurry).await;
    }
    let (run, end) = measured?;
    table::lines(&run, Paint::for_stdout()).iter().for_each(|line| say(line));
    if let Some(mut file) = json {
        file.write_json(&run).map_err(text)?;
    }
    if let Some(mut file) = html {
        file.write(html::page(&run).as_bytes()).map_err(text)?;
    }
    Ok(verdict(&run, &end))
}

/// What this program says to others of how it went.
fn verdict(run: &Run, end: &End) -> ExitCode {
    let summary = &run.summary;
    match end {
        End::Asked(Request::Interrupt) => {
            eprintln!("interrupted after {} of {} cycles", run.cycles.len(), run.settings.cycles);
            ExitCode::from(130)
        }
        End::Asked(Request::Terminate) => ExitCode::from(143),
        End::Aborted(error) => {
            eprintln!("error: {error}");
            ExitCode::from(if run.cycles.is_empty() { 2 } else { 1 })
        }
        End::AllDone if summary.counted < summary.cycles || summary.requests_failed > 0 => ExitCode::FAILURE,
        End::AllDone => ExitCode::SUCCESS,
    }
}

/// The user's files, read before anything runs.
struct Inputs {
    prompts: Option<String>,
    times: Vec<Duration>,
}

impl Inputs {
    fn read(args: &ColdStartArgs) -> Result<Self, String> {
        let text = |path: &Path| {
            fs::read_to_string(path).map_err(|error| format!("cannot read {}: {error}", path.display()))
        };
        let prompts = args.prompts.as_deref().map(text).transpose()?;
        let times = match &args.arrivals {
            Arrivals::File(path) => {
                arrivals::times(&text(path)?).map_err(|error| format!("{}: {error}", path.display()))?
            }
            _ => Vec::new(),
        };
        if let Some(burst) =
            args.burst.map(usize::from).filter(|burst| !times.is_empty() && *burst > times.len())
        {
            return Err(format!(
                "--burst {burst}, but the file of --arrivals has {} times: leave --burst away, or add times",
                times.len()
            ));
        }
        Ok(Self { prompts, times })
    }
}

async fn measured(
    args: &ColdStartArgs,
    inputs: Inputs,
    script: Option<&Script>,
    stage: Option<&Stage>,
    signals: &mut Signals,
) -> Result<(Run, End), String> {
    let bases = stage.map_or_else(|| args.admin.clone(), |stage| vec![stage.admin()]);
    let name = script.map(Script::route).or(args.route.as_deref());
    let admins = Admins::find(bases, name).await?;
    let base = match (stage, &args.url) {
        (Some(stage), _) => stage.base(),
        (None, Some(url)) => url.clone(),
        (None, None) => return Err("there is no --url".to_owned()),
    };
    let model = match args.model.clone().or_else(|| script?.model().map(str::to_owned)) {
        Some(model) => Some(model),
        None => first_model(&base).await,
    };
    let asking =
        Asking { endpoint: args.endpoint, model, max_tokens: args.max_tokens, stream: !args.no_stream };
    let file = args.prompts.as_deref().map_or_else(String::new, |path| format!("{}: ", path.display()));
    let prompts = Prompts::new(&asking, &args.prompt, inputs.prompts.as_deref());
    let mut headers = script.map(Script::headers).unwrap_or_default();
    headers.extend(args.headers());
    let size = args.burst.map_or(inputs.times.len().max(1), usize::from);
    let bench = Bench {
        burst: Burst {
            base,
            endpoint: args.endpoint,
            headers,
            prompts: prompts.map_err(|error| format!("{file}{error}"))?,
            size,
            arrivals: args.arrivals.clone(),
            times: inputs.times,
            seed: args.seed,
            limit: args.timeout.get(),
            id: format!("bench-{:08x}", fastrand::u32(..)),
        },
        admins,
        zero: Zero { stop_command: args.stop_command.clone(), limit: args.timeout.get() },
        pause: args.pause.get(),
        cycles: args.cycles.into(),
    };
    let mut run = Run {
        schema: SCHEMA.to_owned(),
        anteroom: env!("CARGO_PKG_VERSION").to_owned(),
        started_at: humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
        command: args.command(),
        label: args.label.clone(),
        machine: Machine::this(),
        route: bench.admins.route.clone(),
        burst: size,
        idle_s: script.filter(|script| script.stops()).map(|_| args.idle().get().as_secs_f64()),
        settings: Settings {
            target: match (&args.url, &args.config) {
                (Some(_), _) => "running",
                (None, Some(_)) => "own",
                (None, None) => "stand-in",
            }
            .to_owned(),
            cycles: bench.cycles,
            arrivals: args.arrivals.words(),
            seed: args.seed,
            prompts: bench.burst.prompts.count(),
            endpoint: args.endpoint.name().to_owned(),
            model: asking.model,
            max_tokens: args.max_tokens,
            stream: asking.stream,
            pause_s: bench.pause.as_secs_f64(),
            stop_command: args.stop_command.is_some(),
            gpu_hour_price: args.gpu_hour_price,
            currency: args.currency.clone(),
        },
        interrupted: false,
        aborted: None,
        cycles: Vec::new(),
        summary: Summary::default(),
    };
    let progress = Progress::new(bench.cycles);
    let end = tokio::select! {
        // Who asks us to stop does not want to wait for the cycle. It hangs up, and the cycle is not counted.
        biased;
        asked = signals.next() => End::Asked(asked),
        ended = bench.cycles(&progress, &mut run.cycles) => ended.map_or_else(End::Aborted, |()| End::AllDone),
    };
    progress.finish(matches!(end, End::Asked(_)));
    run.interrupted = matches!(end, End::Asked(_));
    if let End::Aborted(error) = &end {
        run.aborted = Some(error.clone());
    }
    run.summary = Summary::of(&run, &Bootstrap { seed: args.seed, ..Bootstrap::default() });
    Ok((run, end))
}

/// The first model that the proxy lists; without one, requests name none.
async fn first_model(base: &Base) -> Option<String> {
    let (_, body) = base.get("/v1/models", Duration::from_secs(10)).await.ok()?;
    let models: serde_json::Value = serde_json::from_slice(&body).ok()?;
    Some(models["data"][0]["id"].as_str()?.to_owned())
}

// === impl Bench ===

impl Bench {
    /// Measures all cycles. Cancel-safe: those that are in `cycles` are whole.
    ///
    /// # Errors
    /// When it cannot go on.
    async fn cycles(&self, progress: &Progress, cycles: &mut Vec<Cycle>) -> Result<(), String> {
        let mut last: Option<Instant> = None;
        for number in 1..=self.cycles {
            self.zero.wait(&self.admins, |what| progress.show(&what)).await?;
            let idle_ms = last.map(|last| last.elapsed().as_secs_f64() * 1e3);
            if !self.pause.is_zero() {
                progress.show("pauses at zero");
                sleep(self.pause).await;
            }
            progress.show("sends the burst, and waits for the answers");
            let kinds = cycles.iter().filter(|cycle| cycle.verdict == Verdict::Cold);
            let kind = kinds.filter_map(|cycle| Some(cycle.cold_start.as_ref()?.kind)).next();
            let mut done = self.burst.run(number, &self.admins, kind).await?;
            done.cycle.idle_ms = idle_ms;
            if let Some(cost) = cycles.last_mut().and_then(|before| before.cost.as_mut()) {
                cost.idle_s = idle_ms.map(|ms| ms / 1e3);
            }
            progress.cycle(&done.cycle);
            cycles.push(done.cycle);
            last = Some(done.ended);
        }
        Ok(())
    }
}
