use clap::Parser as _;

use super::{choice::HOURS_PER_MONTH, *};

#[derive(Debug, clap::Parser)]
struct AdviseCli {
    #[command(flatten)]
    args: AdviseArgs,
}

fn in_tree(path: &str) -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn read(path: &str) -> String {
    std::fs::read_to_string(in_tree(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn parse(line: &str) -> Result<AdviseArgs, clap::Error> {
    AdviseCli::try_parse_from(["advise"].into_iter().chain(line.split_whitespace())).map(|cli| cli.args)
}

async fn run_advise(line: &str) -> Result<String, String> {
    advise(&parse(line).unwrap()).await.map(|(text, _)| text).map_err(|error| error.to_string())
}

/// Joins wrapped lines.
fn joined(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Writes a temporary file.
fn file(text: &str) -> (tempfile::NamedTempFile, String) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    let path = file.path().display().to_string();
    (file, path)
}

#[test]
fn documented_trace_matches_the_generator() {
    let text = read("docs/traces/office-week.csv");
    assert!(text.len() < 300_000, "{} bytes", text.len());
    assert!(text == synthetic::office_week(1).to_csv(), "anteroom bench trace > docs/traces/office-week.csv");
    let week = synthetic::office_week(1);
    assert_eq!(arrivals::parse("week", &text).unwrap().requests, week.requests);
    assert_ne!(synthetic::office_week(2).requests, week.requests);
    // Morning hours have more requests than night hours, except that of the job (02:00); weekends are quiet.
    let hour =
        |request: &arrivals::LoggedRequest| usize::try_from((request.at - week.from) / 3_600_000).unwrap();
    let mut hours = vec![0; 7 * 24];
    for request in &week.requests {
        hours[hour(request)] += 1;
    }
    for day in 0..5 {
        let day = &hours[day * 24..][..24];
        assert!(day[9..12].iter().min() > day[3..8].iter().max(), "{day:?}");
        assert_eq!(day[2], 24, "the job: {day:?}");
    }
    assert!(hours[5 * 24..].iter().sum::<i32>() < 150, "{:?}", &hours[5 * 24..]);
}

#[tokio::test]
async fn documented_examples_match_the_output() {
    let page = read("docs/advise.md");
    let mut examples = 0;
    for block in page.split("```console\n$ anteroom bench advise").skip(1) {
        let block = block.split("```").next().unwrap().replace("\\\n", " ");
        let (command, printed) = block.split_once('\n').unwrap();
        let mut args = parse(command).unwrap();
        for path in args.arrivals.iter_mut().chain(&mut args.records) {
            *path = in_tree(path.to_str().unwrap());
        }
        let (text, _) = advise(&args).await.unwrap();
        // The checkout path varies.
        let text = text.replace(&format!("{}/", env!("CARGO_MANIFEST_DIR")), "");
        assert_eq!(text, printed, "anteroom bench advise{command}");
        examples += 1;
    }
    assert!(examples > 0);
}

/// Returns a log of ten requests of a minute each, one per hour from 08:00.
fn hourly() -> String {
    let line = |hour: usize| format!("2026-11-02T{:02}:00:00Z,60000\n", 8 + hour);
    (0..10).map(line).collect()
}

#[tokio::test]
async fn goal_yields_a_recommendation() {
    let (_keep, path) = file(&hourly());
    let window = "--from 2026-11-02T08:00:00Z --to 2026-11-02T18:00:00Z";
    let base = format!("--arrivals {path} {window} --cold-start 1m --scale-by process --idle 1m,1h");
    // Per hour a minute starting, serving and idle each: 30 of 600 minutes, or 37 of 731 hours per month.
    let text = run_advise(&format!("{base} --goal p99=1m --route tiny")).await.unwrap();
    for words in [
        "Recommended: scale to zero after 1m",
        "37 GPU hours",
        "95 % less",
        "idleTimeout: 1m",
        "- name: tiny",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
    // With 1h of idle time only the first of the ten requests waits.
    let text = joined(&run_advise(&format!("{base} --goal median=0")).await.unwrap());
    assert!(text.contains("Recommended: scale to zero after 1h"), "{text}");
    let (text, reached) = advise(&parse(&format!("{base} --goal p99=1s")).unwrap()).await.unwrap();
    let text = joined(&text);
    assert!(!reached && text.contains("None of 2 settings reaches a p99 of at most 1s"), "{text}");
    let text = joined(&run_advise(&format!("{base} --gpu-hour-price 2 --budget 100/month")).await.unwrap());
    assert!(text.contains("at most 50 GPU hours per month (100)") && text.contains("after 1m"), "{text}");
    let text = run_advise(&base).await.unwrap();
    assert!(text.contains("No recommendation without a goal"), "{text}");
}

#[tokio::test]
async fn configuration_depends_on_scale_by() {
    let (_keep, path) = file(&hourly());
    let base = format!("--arrivals {path} --cold-start 1m --goal p99=1h");
    let text = run_advise(&format!("{base} --idle 5m")).await.unwrap();
    for words in ["minReplicaCount: 0", "cooldownPeriod: 240 ", "linger: 1m"] {
        assert!(text.contains(words), "{words}: {text}");
    }
    let text = run_advise(&format!("{base} --idle 5m --scale-by kubernetes")).await.unwrap();
    assert!(text.contains("scaling: {idleTimeout: 5m}") && !text.contains("minReplicaCount"), "{text}");
    for (line, words) in [
        ("--idle 30s", "is shorter than --linger"),
        ("--scale-by process --floor 1", "needs KEDA"),
        ("--floor 3 --max-replicas 2", "above --max-replicas"),
        ("--linger 29s --idle 1h", "less than twice --polling-interval"),
        ("--gpu-hour-price 0 --budget 1/month", "needs --gpu-hour-price"),
    ] {
        let line = format!("--arrivals {path} --cold-start 1m {line}");
        match run_advise(&line).await {
            Err(error) => assert!(error.contains(words), "{line}: {error}"),
            Ok(text) => panic!("{line}: {text}"),
        }
    }
    let money = parse(&format!("--arrivals {path} --cold-start 1m --budget 1/month")).unwrap();
    assert!(advise(&money).await.unwrap_err().to_string().contains("--gpu-hour-price"));
}

#[tokio::test]
async fn printed_configuration_is_valid() {
    let (_keep, path) = file(&hourly());
    let text = run_advise(&format!(
        "--arrivals {path} --cold-start 1m --scale-by process --goal p99=1h --route tiny"
    ))
    .await
    .unwrap();
    let yaml: String = text
        .split("    # the configuration file\n")
        .nth(1)
        .unwrap()
        .split("\n\n")
        .next()
        .unwrap()
        .lines()
        .map(|line| format!("{}\n", line.strip_prefix("    ").unwrap_or(line)))
        .collect();
    let yaml = yaml.replace("      process:\n", "      process:\n        command: [\"true\", \"{port}\"]\n");
    let (_keep, path) = file(&format!("listen: 127.0.0.1:0\nadmin: 127.0.0.1:0\n{yaml}"));
    let checked =
        crate::config::check(std::path::Path::new(&path), &crate::config::Overrides::default(), None, None);
    let checked = checked.unwrap_or_else(|error| panic!("{}\n{yaml}", error.report()));
    assert!(checked.contains("tiny"), "{checked}");
}

#[tokio::test]
async fn missing_inputs_are_errors_with_a_remedy() {
    let (_keep, log) = file("2026-11-02T08:00:00Z\n");
    let (_kept, records) =
        file("{\"route\":\"a\",\"outcome\":\"failed\"}\n{\"route\":\"b\",\"outcome\":\"failed\"}\n");
    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().display();
    for (line, words) in [
        (format!("--arrivals {log} --cold-start 1m"), "--service-time 8s"),
        ("--arrivals /nowhere --cold-start 1m".to_owned(), "/nowhere: No such file"),
        (format!("--arrivals {log} --service-time 1s --records {records}"), "choose one with --route"),
        (
            format!("--arrivals {log} --service-time 1s --records {records} --route a"),
            "no successful cold start of a (1 failed)",
        ),
        (format!("--arrivals {log} --service-time 1s --records {empty}"), "no *.jsonl"),
        (format!("--arrivals {log} --service-time 1s --records {log}"), "invalid cold-start record"),
        (format!("--arrivals {log} --service-time 1s --admin http://127.0.0.1:1"), "cannot connect"),
        (
            format!("--arrivals {log} --service-time 1s --cold-start 1m --to 2020-01-01T00:00:00Z"),
            "before it starts",
        ),
    ] {
        let error = run_advise(&line).await.unwrap_err();
        assert!(error.contains(words), "{line}: {error}");
    }
    for line in [
        "--cold-start 1m",
        "--synthetic office-week",
        "--synthetic office-week --cold-start 1m --goal p98=1s",
    ] {
        parse(line).unwrap_err();
    }
}

#[tokio::test]
async fn json_has_every_setting_and_sums_up() {
    let line = "--synthetic office-week --cold-start 2m,5m --seeds 3 --goal p99=1h --gpu-hour-price 2 --gpus 2 --json -";
    let value: serde_json::Value = serde_json::from_str(&run_advise(line).await.unwrap()).unwrap();
    assert_eq!(value["schema"], "anteroom.dev/advise/v1");
    let settings = value["settings"].as_array().unwrap();
    assert_eq!(settings.len(), 8 + 2, "8 idle times at zero, and the floors 1 and 2");
    let index = usize::try_from(value["recommended"]["index"].as_u64().unwrap()).unwrap();
    assert_eq!(value["recommended"]["reaches_goal"], true);
    let hours = |row: &serde_json::Value| row["gpu_hours_per_month"].as_f64().unwrap();
    assert!(settings.iter().all(|row| hours(row) >= hours(&settings[index])), "the cheapest");
    // One replica always on with two GPUs, plus replicas added by the HPA.
    assert!(hours(&value["always_on"]) >= 2.0 * HOURS_PER_MONTH - 1e-6);
    for row in settings {
        let figures = &row["figures"];
        let part = |name: &str| figures[name].as_f64().unwrap();
        let parts = part("serving_gpu_hours") + part("idle_gpu_hours") + part("cold_gpu_hours");
        let (low, high) = (&figures["gpu_hours"]["low"], &figures["gpu_hours"]["high"]);
        assert!(low.as_f64().unwrap() <= parts + 1e-9 && parts <= high.as_f64().unwrap() + 1e-9, "{row}");
        assert!((row["price_per_month"].as_f64().unwrap() - 2.0 * hours(row)).abs() < 1e-6);
    }
}
