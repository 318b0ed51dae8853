use axum::{body::to_bytes, http::HeaderValue};

use super::*;
use crate::domain::{ObstacleKind, Part, Phase};

const WORDS: &str = include_str!("words.js");

fn all() -> impl Iterator<Item = &'static Asset> {
    std::iter::once(&PAGE).chain(ASSETS)
}

/// Returns the parts in quotes or parentheses.
fn quoted(text: &str) -> Vec<&str> {
    text.split(['"', '\'', '`', '(', ')']).collect()
}

async fn text(response: Response) -> String {
    String::from_utf8(to_bytes(response.into_body(), 1 << 20).await.unwrap().to_vec()).unwrap()
}

#[tokio::test]
async fn asset_has_its_media_type_and_an_etag() {
    for asset in all() {
        let answer = asset.answer(&HeaderMap::new());
        assert_eq!(answer.status(), StatusCode::OK);
        let field = |name: HeaderName| answer.headers()[name].to_str().unwrap().to_owned();
        assert_eq!(field(CONTENT_TYPE), asset.media_type);
        assert_eq!(
            (field(X_CONTENT_TYPE_OPTIONS), field(CACHE_CONTROL)),
            ("nosniff".into(), "no-cache".into())
        );
        assert!(field(CONTENT_SECURITY_POLICY).starts_with("default-src 'none'; script-src 'self';"));
        assert!(!field(CONTENT_SECURITY_POLICY).contains("unsafe"));
        let tag = field(ETAG);
        assert_eq!(text(answer).await, asset.text);
        for known in [tag.clone(), format!("\"other\", {tag}"), format!("W/{tag}")] {
            let headers = HeaderMap::from_iter([(IF_NONE_MATCH, HeaderValue::from_str(&known).unwrap())]);
            let answer = asset.answer(&headers);
            assert_eq!(answer.status(), StatusCode::NOT_MODIFIED, "{known}");
            assert_eq!(answer.headers()[ETAG], *tag);
            assert_eq!(text(answer).await, "");
        }
        let headers = HeaderMap::from_iter([(IF_NONE_MATCH, HeaderValue::from_static("\"other\""))]);
        assert_eq!(asset.answer(&headers).status(), StatusCode::OK, "it is another one now");
    }
    let none = asset(Path("../admin.rs".into()), HeaderMap::new()).await;
    assert_eq!(none.status(), StatusCode::NOT_FOUND);
}

#[test]
fn page_elements_and_script_agree() {
    let mut wanted: Vec<&str> = vec!["index.html"];
    for asset in all() {
        let names = quoted(asset.text).into_iter().filter_map(|text| {
            text.strip_prefix("dashboard/")
                .or_else(|| text.strip_prefix("./"))
                .filter(|name| name.contains('.'))
        });
        wanted.extend(names);
    }
    wanted.sort_unstable();
    wanted.dedup();
    let mut names: Vec<_> = all().map(|asset| asset.name).collect();
    names.sort_unstable();
    assert_eq!(wanted, names);
}

#[test]
fn page_is_self_contained_and_escapes_markup() {
    for asset in all() {
        for (number, line) in asset.text.lines().enumerate() {
            let place = format!("{}:{}: {line}", asset.name, number + 1);
            let namespace = line.contains("http://www.w3.org/2000/svg");
            let own = line.contains("http://${location.hostname}");
            assert!(
                namespace
                    || own
                    || !line.contains("//")
                    || line.trim_start().starts_with("//")
                    || line.contains(" // "),
                "{place}"
            );
            for forbidden in [
                "innerHTML",
                "outerHTML",
                "insertAdjacentHTML",
                "document.write",
                "DOMParser",
                "eval(",
                "Function(",
                "srcdoc",
                "@import",
                "javascript:",
                "setAttribute('style'",
                " style=",
                " onclick=",
                " onload=",
            ] {
                assert!(!line.contains(forbidden), "{forbidden} in {place}");
            }
        }
    }
}

#[test]
fn everything_has_a_colour_or_a_word() {
    let section = |text: &str, start: &str| {
        text.split_once(start)
            .unwrap()
            .1
            .split_once("};")
            .unwrap()
            .0
            .lines()
            .map(|line| line.trim().to_owned())
            .collect::<Vec<_>>()
    };
    let has = |lines: &[String], name: &str| lines.iter().any(|line| line.starts_with(&format!("{name}: ")));
    let (phases, parts, obstacles) =
        (section(WORDS, "PHASES = {"), section(WORDS, "PARTS = {"), section(WORDS, "OBSTACLES = {"));
    for phase in Phase::ALL {
        assert!(has(&phases, phase.name()), "words.js has no word for {phase:?}");
        let property = format!("--phase-{}:", phase.name().replace('_', "-"));
        assert!(THEME_CSS.contains(&property), "theme.css has no {property}");
    }
    for part in Part::ALL {
        assert!(has(&parts, part.name()), "words.js has no word for {part:?}");
    }
    for kind in ObstacleKind::ALL {
        assert!(has(&obstacles, kind.name()), "words.js has no word for {kind:?}");
    }
}

/// The colours of a file, light and dark.
fn colours(text: &'static str) -> Vec<(&'static str, [&'static str; 2])> {
    let pairs = text.lines().filter_map(|line| {
        let (name, rest) = line.trim().strip_prefix("--")?.split_once(": light-dark(")?;
        let (light, dark) = rest.strip_suffix(");")?.split_once(", ")?;
        light.starts_with('#').then_some((name, [light, dark]))
    });
    pairs.collect()
}

/// Relative luminance, as WCAG 2.2 defines it.
fn luminance(colour: &str) -> f64 {
    let part = |at: usize| {
        let value = f64::from(u8::from_str_radix(&colour[at..at + 2], 16).unwrap()) / 255.0;
        if value <= 0.04045 { value / 12.92 } else { ((value + 0.055) / 1.055).powf(2.4) }
    };
    0.2126 * part(1) + 0.7152 * part(3) + 0.0722 * part(5)
}

fn contrast(one: &str, other: &str) -> f64 {
    let (one, other) = (luminance(one), luminance(other));
    (one.max(other) + 0.05) / (one.min(other) + 0.05)
}

#[test]
fn text_and_bars_stand_out_in_both_themes() {
    assert!((contrast("#ffffff", "#000000") - 21.0).abs() < 1e-9 && contrast("#777777", "#777777") < 1.001);
    let (phases, page): (Vec<_>, Vec<_>) =
        colours(THEME_CSS).into_iter().partition(|(name, _)| name.starts_with("phase-"));
    assert_eq!(phases.len(), Phase::ALL.len() + 1);
    let of =
        |name: &str| page.iter().find(|(known, _)| *known == name).unwrap_or_else(|| panic!("no --{name}")).1;
    let mut wrong = Vec::new();
    let mut check = |name: &str, colours: [&str; 2], on: &str, least: f64| {
        for (theme, (colour, ground)) in ["light", "dark"].iter().zip(colours.into_iter().zip(of(on))) {
            let contrast = contrast(colour, ground);
            if contrast < least {
                wrong.push(format!("{theme}: --{name} on --{on}: {contrast:.2} < {least}"));
            }
        }
    };
    for text in ["ink", "ink-2", "ink-3", "accent", "good", "busy", "bad", "rest"] {
        for ground in ["bg", "surface", "sunken"] {
            check(text, of(text), ground, 4.5);
        }
    }
    for text in ["ink", "ink-2", "ink-3"] {
        check(text, of(text), "bad-wash", 4.5);
        check(text, of(text), "busy-wash", 4.5);
    }
    for (phase, colours) in phases {
        // `sunken` is the background of a row under the pointer.
        check(phase, colours, "surface", 3.0);
        check(phase, colours, "sunken", 3.0);
    }
    check("line-strong", of("line-strong"), "surface", 3.0);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
