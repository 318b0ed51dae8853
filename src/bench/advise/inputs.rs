//! What is replayed: requests from logs, start-ups from records.

use std::{
    io::Read as _,
    path::{Path, PathBuf},
    time::Duration,
};

use http::StatusCode;

use super::{
    AdviseError,
    args::{AdviseArgs, Synthetic},
    arrivals::{self, Trace},
    grid::Load,
    records::Measured,
    synthetic,
};
use crate::{bench::http::Base, coldstart::ColdStarts};

/// How long the admin listener may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// What was read.
pub(super) struct Inputs {
    /// What the requests are from.
    pub(super) source: String,
    /// The requests.
    pub(super) trace: Trace,
    /// Lines of requests that wake nothing.
    pub(super) wakes_nothing: usize,
    /// Lines that were not understood.
    pub(super) skipped: usize,
    /// File, line and reason of the first of those.
    pub(super) first_skipped: Option<String>,
    /// What is drawn where the log has no duration.
    pub(super) service: Vec<u64>,
    /// Start-ups, in order of their length.
    pub(super) start_up: Vec<u64>,
    /// What they are from; `None`: given.
    pub(super) records: Option<Measured>,
}

// === impl Inputs ===

impl Inputs {
    /// Reads all that the arguments name.
    pub(super) async fn read(args: &AdviseArgs) -> Result<Self, AdviseError> {
        let mut inputs = Self::of_requests(args)?;
        let known = inputs.trace.requests.iter().filter_map(|request| request.service);
        inputs.service = match args.service_time {
            Some(given) => vec![u64::try_from(given.get().as_millis()).unwrap_or(u64::MAX)],
            None => known.collect(),
        };
        if inputs.service.is_empty() {
            return Err(AdviseError::Input(format!(
                "{}: no request has a duration; say how long one takes with --service-time 8s",
                inputs.source
            )));
        }
        inputs.service.sort_unstable();
        if args.cold_start.is_empty() {
            let measured = measured(args).await?;
            inputs.start_up.clone_from(&measured.until_ready);
            inputs.records = Some(measured);
        } else {
            let given = args.cold_start.iter().map(|period| period.get().as_millis());
            inputs.start_up = given.map(|ms| u64::try_from(ms).unwrap_or(u64::MAX)).collect();
        }
        inputs.start_up.sort_unstable();
        Ok(inputs)
    }

    fn of_requests(args: &AdviseArgs) -> Result<Self, AdviseError> {
        let mut source = Vec::new();
        let mut requests = Vec::new();
        let (mut wakes_nothing, mut skipped, mut first_skipped) = (0, 0, None);
        // A made-up log says itself when it begins and ends.
        let (mut from, mut to) = (None, None);
        if let Some(Synthetic::OfficeWeek) = args.synthetic {
            let week = synthetic::office_week(1);
            (from, to) = (Some(week.from), Some(week.to));
            requests = week.requests;
            source.push("office-week, made up".to_owned());
        }
        for path in &args.arrivals {
            let name =
                if path.as_os_str() == "-" { "standard input".into() } else { path.display().to_string() };
            let parsed = arrivals::parse(&name, &read(path)?)
                .map_err(|error| AdviseError::Input(error.to_string()))?;
            requests.extend(parsed.requests);
            wakes_nothing += parsed.wakes_nothing;
            skipped += parsed.skipped;
            let place = parsed.first_skipped.map(|(line, reason)| format!("{name}:{line}: {reason}"));
            first_skipped = first_skipped.or(place);
            source.push(name);
        }
        let source = source.join(", ");
        let from = args.from.map(jiff::Timestamp::as_millisecond).or(from);
        let to = args.to.map(jiff::Timestamp::as_millisecond).or(to);
        let trace = Trace::new(requests, from, to)
            .map_err(|reason| AdviseError::Input(format!("{source}: {reason}")))?;
        Ok(Self {
            source,
            trace,
            wakes_nothing,
            skipped,
            first_skipped,
            service: Vec::new(),
            start_up: Vec::new(),
            records: None,
        })
    }

    /// What is replayed.
    pub(super) fn load(&self, gpus: u32) -> Load {
        let requests = self.trace.requests.iter();
        Load {
            arrivals: requests
                .map(|request| (request.at.abs_diff(self.trace.from), request.service))
                .collect(),
            window: self.trace.window(),
            service: self.service.clone(),
            start_up: self.start_up.clone(),
            gpus,
        }
    }
}

async fn measured(args: &AdviseArgs) -> Result<Measured, AdviseError> {
    let mut measured = Measured::default();
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
        let (name, text) = ask(admin).await?;
        measured
            .read(&text, args.route.as_deref())
            .map_err(|reason| AdviseError::Input(format!("{name}: {reason}")))?;
        names.push(name);
    }
    let names = names.join(", ");
    if measured.routes.len() > 1 {
        let routes = measured.routes.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
        return Err(AdviseError::Input(format!(
            "{names}: these are records of {routes}, whose starts differ; say which with --route"
        )));
    }
    if measured.until_ready.is_empty() {
        return Err(AdviseError::Input(format!(
            "{names}: no cold start{} in which the target got ready ({} failed); measure some with `anteroom bench \
             cold-start`, or say how long one takes with --cold-start 4m",
            args.route.as_ref().map(|route| format!(" of {route}")).unwrap_or_default(),
            measured.failed
        )));
    }
    Ok(measured)
}

/// What a running Anteroom says of its cold starts, and where.
async fn ask(admin: &Base) -> Result<(String, String), AdviseError> {
    let path = format!("/api/v1/cold-starts?limit={}", ColdStarts::MAX_RECORDS);
    let name = format!("{admin}{path}");
    match admin.get(&path, PATIENCE).await {
        Ok((StatusCode::OK, body)) => Ok((name, String::from_utf8_lossy(&body).into_owned())),
        Ok((status, _)) => {
            Err(AdviseError::Input(format!("{name}: {status}; is this the admin address of Anteroom?")))
        }
        Err(reason) => Err(AdviseError::Input(format!("{name}: {reason}"))),
    }
}

/// The file, or those of the folder that have records.
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
        return Err(AdviseError::Input(format!("{}: no *.jsonl in this folder", path.display())));
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
