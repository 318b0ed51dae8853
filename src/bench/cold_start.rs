//! `anteroom bench cold-start`: cycles of waiting for zero, sending a burst and fetching the record.

mod admin;
mod args;
mod arrivals;
mod cycle;
mod local_proxy;
mod progress;
mod prompts;
mod request;
mod zero;

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, SystemTime},
};

use tokio::time::{Instant, sleep};

use self::{
    admin::AdminApis,
    arrivals::Arrivals,
    cycle::Burst,
    local_proxy::{LocalProxy, ProxySpec},
    progress::Progress,
    prompts::{BodyDefaults, Prompts},
    zero::ZeroWait,
};
use super::{
    html,
    http::BaseUrl,
    results::{Cycle, CycleVerdict, Machine, Run, RunSettings, SCHEMA, Summary},
    stats::Bootstrap,
    table,
};
use crate::{
    drain::{Signals, StopSignal},
    output::OutputFile,
    terminal::{Paint, say},
};
pub use args::ColdStartArgs;
#[cfg(test)]
pub(super) use args::DEFAULT_CYCLES;

/// Everything needed to run cycles.
struct CycleRunner {
    admins: AdminApis,
    burst: Burst,
    zero: ZeroWait,
    pause: Duration,
    cycles: usize,
}

/// Reason for the end of a run.
enum RunEnd {
    Completed,
    Signal(StopSignal),
    Aborted(String),
}

/// Runs the command.
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
    let inputs = InputFiles::read(args)?;
    let open = |path: &Option<PathBuf>| path.as_deref().map(OutputFile::open).transpose();
    let (json, html) = (open(&args.json).map_err(text)?, open(&args.html).map_err(text)?);
    let mut signals = Signals::new().map_err(|error| format!("cannot handle signals: {error}"))?;
    let spec = match (&args.url, &args.config) {
        (Some(_), _) => None,
        (None, Some(file)) => Some(ProxySpec::read(file, args.route.as_deref())?),
        (None, None) => Some(ProxySpec::stand_in(args.load_time)?),
    };
    let local_proxy = match spec.clone() {
        Some(spec) => Some(spec.start(args.idle_timeout()).await?),
        None => None,
    };
    let measured = benchmark(args, inputs, spec.as_ref(), local_proxy.as_ref(), &mut signals).await;
    if let Some(local_proxy) = local_proxy {
        let second_signal = async {
            signals.next().await;
        };
        local_proxy.stop(second_signal).await;
    }
    let (run, end) = measured?;
    // Write the files before the table: printing to a closed pipe ends the process.
    let json = json.map_or(Ok(()), |mut file| file.write_json(&run));
    let html = html.map_or(Ok(()), |mut file| file.write(html::page(&run).as_bytes()));
    table::lines(&run, Paint::for_stdout()).iter().for_each(|line| say(line));
    json.and(html).map_err(text)?;
    Ok(exit_code(&run, &end))
}

/// Maps the result to the exit code and reports an early end.
fn exit_code(run: &Run, end: &RunEnd) -> ExitCode {
    let summary = &run.summary;
    match end {
        RunEnd::Signal(StopSignal::Interrupt) => {
            eprintln!("interrupted after {} of {} cycles", run.cycles.len(), run.settings.cycles);
            ExitCode::from(130)
        }
        RunEnd::Signal(StopSignal::Terminate) => ExitCode::from(143),
        RunEnd::Aborted(error) => {
            eprintln!("error: {error}");
            ExitCode::from(if run.cycles.is_empty() { 2 } else { 1 })
        }
        RunEnd::Completed if summary.counted < summary.cycles || summary.requests_failed > 0 => {
            ExitCode::FAILURE
        }
        RunEnd::Completed => ExitCode::SUCCESS,
    }
}

/// Contents of the user's files, read before anything starts.
struct InputFiles {
    prompts: Option<String>,
    times: Vec<Duration>,
}

impl InputFiles {
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
                "--burst {burst}, but the --arrivals file has {} times; omit --burst or add times",
                times.len()
            ));
        }
        Ok(Self { prompts, times })
    }
}

async fn benchmark(
    args: &ColdStartArgs,
    inputs: InputFiles,
    spec: Option<&ProxySpec>,
    local_proxy: Option<&LocalProxy>,
    signals: &mut Signals,
) -> Result<(Run, RunEnd), String> {
    let bases = local_proxy.map_or_else(|| args.admin.clone(), |local_proxy| vec![local_proxy.admin()]);
    let name = spec.map(ProxySpec::route).or(args.route.as_deref());
    let admins = AdminApis::connect(bases, name).await?;
    let base = match (local_proxy, &args.url) {
        (Some(local_proxy), _) => local_proxy.base(),
        (None, Some(url)) => url.clone(),
        (None, None) => return Err("--url is missing".to_owned()),
    };
    let model = match args.model.clone().or_else(|| spec?.model().map(str::to_owned)) {
        Some(model) => Some(model),
        None => first_model(&base).await,
    };
    let defaults =
        BodyDefaults { endpoint: args.endpoint, model, max_tokens: args.max_tokens, stream: !args.no_stream };
    let file = args.prompts.as_deref().map_or_else(String::new, |path| format!("{}: ", path.display()));
    let prompts = Prompts::new(&defaults, &args.prompt, inputs.prompts.as_deref());
    let mut headers = spec.map(ProxySpec::headers).unwrap_or_default();
    headers.extend(args.headers());
    let size = args.burst.map_or(inputs.times.len().max(1), usize::from);
    let bench = CycleRunner {
        burst: Burst {
            base,
            endpoint: args.endpoint,
            headers,
            prompts: prompts.map_err(|error| format!("{file}{error}"))?,
            size,
            arrivals: args.arrivals.clone(),
            times: inputs.times,
            seed: args.seed,
            timeout: args.timeout.get(),
            id_prefix: format!("bench-{:08x}", fastrand::u32(..)),
        },
        admins,
        zero: ZeroWait { stop_command: args.stop_command.clone(), timeout: args.timeout.get() },
        pause: args.pause.get(),
        cycles: args.cycles.into(),
    };
    let mut run = Run {
        schema: SCHEMA.to_owned(),
        anteroom: env!("CARGO_PKG_VERSION").to_owned(),
        started_at: humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
        command: args.command(),
        label: args.label.clone(),
        machine: Machine::of_this_host(),
        route: bench.admins.route.clone(),
        burst: size,
        idle_s: spec.filter(|spec| spec.is_process()).map(|_| args.idle_timeout().get().as_secs_f64()),
        settings: RunSettings {
            target: match (&args.url, &args.config) {
                (Some(_), _) => "running",
                (None, Some(_)) => "own",
                (None, None) => "stand-in",
            }
            .to_owned(),
            cycles: bench.cycles,
            arrivals: args.arrivals.pattern(),
            seed: args.seed,
            prompts: bench.burst.prompts.count(),
            endpoint: args.endpoint.name().to_owned(),
            model: defaults.model,
            max_tokens: args.max_tokens,
            stream: defaults.stream,
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
        // Biased: a signal ends the run at once. The current cycle is dropped, which closes its connections.
        biased;
        asked = signals.next() => RunEnd::Signal(asked),
        ended = bench.run_cycles(&progress, &mut run.cycles) => ended.map_or_else(RunEnd::Aborted, |()| RunEnd::Completed),
    };
    progress.finish(matches!(end, RunEnd::Signal(_)));
    run.interrupted = matches!(end, RunEnd::Signal(_));
    if let RunEnd::Aborted(error) = &end {
        run.aborted = Some(error.clone());
    }
    run.summary = Summary::of(&run, &Bootstrap { seed: args.seed, ..Bootstrap::default() });
    Ok((run, end))
}

/// Returns the first model that the proxy lists.
async fn first_model(base: &BaseUrl) -> Option<String> {
    let (_, body) = base.get("/v1/models", Duration::from_secs(10)).await.ok()?;
    let models: serde_json::Value = serde_json::from_slice(&body).ok()?;
    Some(models["data"][0]["id"].as_str()?.to_owned())
}

// === impl CycleRunner ===

impl CycleRunner {
    /// Runs all cycles. Cancel-safe: `cycles` only gets finished ones.
    async fn run_cycles(&self, progress: &Progress, cycles: &mut Vec<Cycle>) -> Result<(), String> {
        let mut last: Option<Instant> = None;
        for number in 1..=self.cycles {
            self.zero.wait(&self.admins, |activity| progress.show(&activity)).await?;
            let idle_ms = last.map(|last| last.elapsed().as_secs_f64() * 1e3);
            if !self.pause.is_zero() {
                progress.show("pausing at zero");
                sleep(self.pause).await;
            }
            progress.show("sending the burst, waiting for the answers");
            let kinds = cycles.iter().filter(|cycle| cycle.verdict == CycleVerdict::Cold);
            let kind = kinds.filter_map(|cycle| Some(cycle.cold_start.as_ref()?.kind)).next();
            let mut done = self.burst.run(number, &self.admins, kind).await?;
            done.cycle.idle_ms = idle_ms;
            if let Some(cost) = cycles.last_mut().and_then(|before| before.cost.as_mut()) {
                cost.idle_s = idle_ms.map(|ms| ms / 1e3);
            }
            progress.finish_cycle(&done.cycle);
            cycles.push(done.cycle);
            last = Some(done.ended);
        }
        Ok(())
    }
}
