//! Inputs of a replay: requests from logs, start-up times from records.

use std::{
    io::Read as _,
    path::{Path, PathBuf},
    time::Duration,
};

use http::StatusCode;

use super::{
    args::{AdviseArgs, SyntheticLog},
    arrivals::{self, RequestLog},
    error::AdviseError,
    grid::ReplayInput,
    records::StartUpRecords,
    synthetic,
};
use crate::{bench::http::BaseUrl, coldstart::ColdStarts};

/// Timeout of the request to the admin API.
const ADMIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Requests and start-up times.
pub(super) struct AdviseInputs {
    /// Names of the log files.
    pub(super) source: String,
    pub(super) trace: RequestLog,
    /// Number of requests that need no model server.
    pub(super) without_work: usize,
    /// Number of invalid lines.
    pub(super) skipped: usize,
    /// File, line and error of the first invalid line.
    pub(super) first_skipped: Option<String>,
    /// Sorted sample for requests without a duration.
    pub(super) service: Vec<u64>,
    /// Sorted sample of start-up times.
    pub(super) start_up: Vec<u64>,
    /// Records behind `start_up`; `None` with `--cold-start`.
    pub(super) records: Option<StartUpRecords>,
}

// === impl AdviseInputs ===

impl AdviseInputs {
    /// Reads all sources named by the arguments.
    pub(super) async fn read(args: &AdviseArgs) -> Result<Self, AdviseError> {
        let mut inputs = Self::read_requests(args)?;
        let known = inputs.trace.requests.iter().filter_map(|request| request.service);
        inputs.service = match args.service_time {
            Some(given) => vec![u64::try_from(given.get().as_millis()).unwrap_or(u64::MAX)],
            None => known.collect(),
        };
        if inputs.service.is_empty() {
            return Err(AdviseError::Input(format!(
                "{}: no request has a duration; set one, for example with --service-time 8s",
                inputs.source
            )));
        }
        inputs.service.sort_unstable();
        if args.cold_start.is_empty() {
            let measured = read_records(args).await?;
            inputs.start_up.clone_from(&measured.until_ready);
            inputs.records = Some(measured);
        } else {
            let given = args.cold_start.iter().map(|period| period.get().as_millis());
            inputs.start_up = given.map(|ms| u64::try_from(ms).unwrap_or(u64::MAX)).collect();
        }
        inputs.start_up.sort_unstable();
        Ok(inputs)
    }

    fn read_requests(args: &AdviseArgs) -> Result<Self, AdviseError> {
        let mut source = Vec::new();
        let mut requests = Vec::new();
        let (mut without_work, mut skipped, mut first_skipped) = (0, 0, None);
        // A synthetic log defines its window.
        let (mut from, mut to) = (None, None);
        if let Some(SyntheticLog::OfficeWeek) = args.synthetic {
            let week = synthetic::office_week(1);
            (from, to) = (Some(week.from), Some(week.to));
            requests = week.requests;
            source.push("office-week, synthetic".to_owned());
        }
        for path in &args.arrivals {
            let name =
                if path.as_os_str() == "-" { "standard input".into() } else { path.display().to_string() };
            let parsed = arrivals::parse(&name, &read(path)?)
                .map_err(|error| AdviseError::Input(error.to_string()))?;
            requests.extend(parsed.requests);
            without_work += parsed.without_work;
            skipped += parsed.skipped;
            let place = parsed.first_skipped.map(|(line, reason)| format!("{name}:{line}: {reason}"));
            first_skipped = first_skipped.or(place);
            source.push(name);
        }
        let source = source.join(", ");
        let from = args.from.map(jiff::Timestamp::as_millisecond).or(from);
        let to = args.to.map(jiff::Timestamp::as_millisecond).or(to);
        let trace = RequestLog::new(requests, from, to)
            .map_err(|reason| AdviseError::Input(format!("{source}: {reason}")))?;
        Ok(Self {
            source,
            trace,
            without_work,
            skipped,
            first_skipped,
            service: Vec::new(),
            start_up: Vec::new(),
            records: None,
        })
    }

    /// Converts to the input of a replay.
    pub(super) fn load(&self, gpus: u32) -> ReplayInput {
        let requests = self.trace.requests.iter();
        ReplayInput {
            arrivals: requests
                .map(|request| (request.at.abs_diff(self.trace.from), request.service))
                .collect(),
            window: self.trace.window_ms(),
            service: self.service.clone(),
            start_up: self.start_up.clone(),
            gpus,
        }
    }
}

async fn read_records(args: &AdviseArgs) -> Result<StartUpRecords, AdviseError> {
    let mut measured = StartUpRecords::default();
    let mut names = Vec::new();
    for path in &args.records {
        for file in files(path)? {
            let name = file.display().to_string();
            measured
                .read(&read(&file)?, args.route.as_deref())
                .map_err(|reason| AdviseError::Input(format!("{name}: {reason}")))?;
            names.push(name);
        }
    }
    if let Some(admin) = &args.admin {
        let (name, text) = fetch_cold_starts(admin).await?;
        measured
            .read(&text, args.route.as_deref())
            .map_err(|reason| AdviseError::Input(format!("{name}: {reason}")))?;
        names.push(name);
    }
    let names = names.join(", ");
    if measured.routes.len() > 1 {
        let routes = measured.routes.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
        return Err(AdviseError::Input(format!(
            "{names}: the records are of several routes; choose one with --route: {routes}"
        )));
    }
    if measured.until_ready.is_empty() {
        return Err(AdviseError::Input(format!(
            "{names}: no successful cold start{} ({} failed); measure some with `anteroom bench cold-start`, or set a \
             start-up time, for example with --cold-start 4m",
            args.route.as_ref().map(|route| format!(" of {route}")).unwrap_or_default(),
            measured.failed
        )));
    }
    Ok(measured)
}

/// Fetches the cold starts of a running Anteroom. Returns their URL and the response.
async fn fetch_cold_starts(admin: &BaseUrl) -> Result<(String, String), AdviseError> {
    let path = format!("/api/v1/cold-starts?limit={}", ColdStarts::MAX_RECORDS);
    let name = format!("{admin}{path}");
    match admin.get(&path, ADMIN_TIMEOUT).await {
        Ok((StatusCode::OK, body)) => Ok((name, String::from_utf8_lossy(&body).into_owned())),
        Ok((status, _)) => Err(AdviseError::Input(format!(
            "{name}: HTTP {status}; check that this is the admin address of Anteroom"
        ))),
        Err(reason) => Err(AdviseError::Input(format!("{name}: {reason}"))),
    }
}

/// Returns the file itself, or the *.jsonl files of a directory.
fn files(path: &Path) -> Result<Vec<PathBuf>, AdviseError> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let failed = |error| AdviseError::Input(format!("{}: {error}", path.display()));
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(failed)? {
        let file = entry.map_err(failed)?.path();
        if file.extension().is_some_and(|extension| extension == "jsonl") {
            files.push(file);
        }
    }
    files.sort();
    if files.is_empty() {
        return Err(AdviseError::Input(format!("{}: no *.jsonl in this directory", path.display())));
    }
    Ok(files)
}

fn read(path: &Path) -> Result<String, AdviseError> {
    let failed = |error: std::io::Error| AdviseError::Input(format!("{}: {error}", path.display()));
    if path.as_os_str() == "-" {
        let mut text = String::new();
        std::io::stdin().lock().read_to_string(&mut text).map_err(failed)?;
        return Ok(text);
    }
    std::fs::read_to_string(path).map_err(failed)
}
