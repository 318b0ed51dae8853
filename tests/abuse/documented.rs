//! Checks of `docs/security.md`: every key in its table exists in the configuration and has the documented default,
//! every key of `limits` is in the table, and every test named there exists.

use std::{collections::HashSet, env, fmt::Write as _, fs, path::Path};

use anteroom::{
    config::{
        Limits,
        budget::{
            ADMIN_CONNECTIONS, ADMIN_REQUEST_BYTES, ANSWER_COST_BYTES, BASE_BYTES, BASE_PARTS,
            CONNECTION_COST_BYTES, GRPC_CALL_BYTES, GRPC_CONNECTION_BYTES, GRPC_CONNECTIONS, H2_HEAD_FACTOR,
            RELAY_COST_BYTES, STREAM_COST_BYTES, UNCOUNTED_HEAD_BYTES, WorstCase,
        },
        sections,
    },
    openai::MAX_MODEL_BYTES,
};

fn in_tree(path: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Collects the names of all functions marked as tests in the sources below `folder`.
fn collect_tests(folder: &Path, found: &mut HashSet<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect_tests(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let marked = ["#[test]", "#[tokio::test"].iter().flat_map(|mark| text.split(mark).skip(1));
            let functions = marked.filter_map(|rest| rest.split_once("fn ")?.1.split_once('('));
            found.extend(functions.map(|(name, _)| name.to_owned()));
        }
    }
}

/// Returns the texts between backticks.
fn quoted(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

#[test]
fn documented_limits_and_tests_exist() {
    let document = fs::read_to_string(in_tree("docs/security.md")).unwrap();
    let (_, table) = document.split_once("<!-- begin: limits -->").expect("a table of limits");
    let (table, _) = table.split_once("<!-- end: limits -->").expect("an end of the table of limits");
    let sections = sections();
    let key_of = |path: &str| {
        let (section, name) = path.rsplit_once('.').unwrap_or(("", path));
        let section = sections.iter().find(|known| known.path == section)?;
        section.keys.iter().find(|key| key.name == name)
    };
    let mut tests = HashSet::new();
    for folder in ["src", "tests"] {
        collect_tests(&in_tree(folder), &mut tests);
    }

    let mut named = HashSet::new();
    let rows: Vec<&str> = table.lines().filter(|line| line.starts_with("| ")).skip(2).collect();
    assert!(rows.len() > 20, "{rows:?}");
    for row in rows {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").map(str::trim).collect();
        let [limit, default, what, shown] = cells[..] else { panic!("four cells in {row}") };
        assert!(!what.is_empty(), "{row}");
        // Limits without a key are constants, described in words.
        if let Some(path) = quoted(limit).first() {
            let key = key_of(path).unwrap_or_else(|| panic!("no key {path}"));
            let told = quoted(default).first().map_or_else(|| default.to_owned(), |told| (*told).to_owned());
            let real = key
                .default
                .as_ref()
                .map_or("none".to_owned(), |real| real.as_str().map_or(real.to_string(), Into::into));
            assert_eq!(told, real, "the default of {path}");
            named.insert((*path).to_owned());
        }
        let shown = quoted(shown);
        assert!(!shown.is_empty(), "no test in {row}");
        for test in shown {
            assert!(tests.contains(test), "no test {test}");
        }
    }
    for key in &sections.iter().find(|section| section.path == "limits").unwrap().keys {
        assert!(named.contains(&format!("limits.{}", key.name)), "limits.{} is not in the table", key.name);
    }
    // Tests can also be named in the text outside the table.
    for test in
        quoted(&document).into_iter().filter(|word| word.matches('_').count() >= 3 && !word.contains(' '))
    {
        assert!(tests.contains(test), "no test {test}");
    }
}

/// Renders the formula, its result for the chart's memory limit and for larger machines, and the costs of single items.
fn memory_numbers() -> String {
    let mib = |bytes: usize| format!("{} MiB", bytes.div_ceil(1 << 20));
    let kib = |bytes: usize| format!("{} KiB", bytes.div_ceil(1 << 10));
    let defaults = |gibibytes: usize| {
        let mut limits = Limits::default();
        limits.max_buffered_bytes = limits.fitting_bytes(gibibytes << 30);
        limits.max_connections = Limits::fitting_connections(gibibytes << 30);
        WorstCase::of(&limits)
    };
    let cases = [1, 4, 16].map(defaults);
    let row = |name: &str, part: fn(&WorstCase) -> usize| {
        format!("| {name} | {} |\n", cases.each_ref().map(|case| mib(part(case))).join(" | "))
    };
    let mut text = format!(
        "\n`maxConnections` × {} + `maxBufferedBytes` × (1 + ¼ + ⅛ + ¼) + {}\n\n\
         Where they are not set, `maxBufferedBytes` is a quarter of the memory limit, at least `maxBodyBytes` and at most \
         `{}`; and `maxConnections` is what another quarter has room for, or what is left if that is less, at most `{}`:\n\n\
         | memory limit | 1 GiB (the chart's) | 4 GiB | 16 GiB |\n| --- | --- | --- | --- |\n",
        kib(CONNECTION_COST_BYTES),
        mib(BASE_BYTES),
        Limits::default().max_buffered_bytes,
        Limits::default().max_connections,
    );
    let connections = cases.each_ref().map(|case| case.connections.to_string()).join(" | ");
    writeln!(text, "| `maxConnections` | {connections} |").unwrap();
    text += &row("connections", |case| case.connection_bytes);
    text += &row("`maxBufferedBytes`: bodies, heads that are not whole", |case| case.bodies);
    text += &row("requests over HTTP/2 and large heads, besides bodies", |case| case.requests);
    text += &row("answers of ours that are not read", |case| case.answers);
    text += &row("answers of model servers and WebSockets that are not read", |case| case.relays);
    text += &row("all else", |_| BASE_BYTES);
    text += &row("sum", WorstCase::total);
    writeln!(
        text,
        "\n| listener | connections | one connection | one request or stream | one name |\n\
         | --- | --- | --- | --- | --- |\n\
         | requests, HTTP/1 | `maxConnections` | {connection} | its body; of its head what is beyond {uncounted}; {relay} from \
         its server | {name} |\n\
         | requests, HTTP/2 | the same | {connection}; {factor} × `maxHeaderBytes` for a head of several frames | {stream} and its \
         head; its body; an unread answer {answer} and its body; {relay} from its server | {name} |\n\
         | admin | {admin} | {of_admin} | a GET | |\n\
         | scaler, replicas | {grpc} each | {of_grpc} | {of_call}; see [Limits](#limits) | 253 bytes |\n",
        connection = kib(CONNECTION_COST_BYTES),
        uncounted = kib(UNCOUNTED_HEAD_BYTES),
        relay = kib(RELAY_COST_BYTES),
        factor = H2_HEAD_FACTOR,
        stream = kib(STREAM_COST_BYTES),
        answer = kib(ANSWER_COST_BYTES),
        name = kib(MAX_MODEL_BYTES),
        admin = ADMIN_CONNECTIONS,
        of_admin = kib(ADMIN_REQUEST_BYTES),
        grpc = GRPC_CONNECTIONS,
        of_grpc = kib(GRPC_CONNECTION_BYTES),
        of_call = kib(GRPC_CALL_BYTES),
    )
    .unwrap();
    text += "| all else | memory |\n| --- | --- |\n";
    for (part, bytes) in BASE_PARTS {
        writeln!(text, "| {part} | {} |", kib(bytes)).unwrap();
    }
    text.push('\n');
    text
}

#[test]
fn documented_memory_numbers_match_code() {
    const MARKS: [&str; 2] = ["<!-- begin: memory -->\n", "<!-- end: memory -->"];
    let path = in_tree("docs/security.md");
    let document = fs::read_to_string(&path).unwrap();
    let (before, rest) = document.split_once(MARKS[0]).expect("the beginning of the numbers");
    let (_, after) = rest.split_once(MARKS[1]).expect("their end");
    let now = [before, MARKS[0], &memory_numbers(), MARKS[1], after].concat();
    if env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&path, &now).unwrap();
    }
    assert!(
        document == now,
        "if the numbers are right: UPDATE_DOCS=1 cargo test --test abuse memory_numbers"
    );
}
