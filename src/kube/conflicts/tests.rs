use proptest::prelude::*;
use serde_json::json;

use super::*;

fn route(name: &str, matching: serde_json::Value) -> Route {
    serde_json::from_value(json!({"name": name, "match": matching, "target": {"url": "http://a:1"}})).unwrap()
}

fn candidate(kind: RouteKind, name: &str, created: i64, matching: serde_json::Value) -> RouteCandidate {
    let object = RouteObject { kind, namespace: "models".into(), name: name.into() };
    let route = route(object.key().as_str(), matching);
    RouteCandidate { object, created: Some(created), route: Ok((route.into(), Vec::new())) }
}

fn model_route_candidate(name: &str, created: i64, matching: serde_json::Value) -> RouteCandidate {
    candidate(RouteKind::ModelRoute, name, created, matching)
}

/// Resolves the candidates. Returns the served routes, and each object with the reason and message of its verdict.
fn resolved_verdicts(
    file: &[Route],
    candidates: Vec<RouteCandidate>,
) -> (Vec<String>, Vec<(String, &'static str, String)>) {
    let Resolution { routes, verdicts } = resolve_conflicts(file, candidates);
    let told =
        verdicts.iter().map(|(object, verdict)| (object.name.clone(), verdict.reason(), verdict.message()));
    (routes.iter().map(|route| route.name.to_string()).collect(), told.collect())
}

#[test]
fn file_precedes_older_object() {
    let file = [route("tiny", json!({"models": ["tiny"]}))];
    let (routes, told) = resolved_verdicts(
        &file,
        vec![
            model_route_candidate("young", 30, json!({"models": ["big"]})),
            model_route_candidate("old", 10, json!({"models": ["big"]})),
            model_route_candidate("tiny", 1, json!({"models": ["tiny"]})),
            model_route_candidate("other", 40, json!({"models": ["big"], "hosts": ["a.example.com"]})),
        ],
    );
    assert_eq!(routes, ["models/old", "models/other"], "by age");
    let [old, other, tiny, young] = &told[..] else { panic!("{told:?}") };
    assert_eq!((old.1, other.1), ("Accepted", "Accepted"));
    assert_eq!(young.1, "Conflict");
    assert!(
        young.2.contains(
            "ModelRoute models/old matches model \"big\" as well, and takes precedence; nothing is left"
        ),
        "{}",
        young.2
    );
    assert_eq!(tiny.1, "Conflict");
    assert!(tiny.2.contains("the route \"tiny\" of the proxy's configuration"), "{}", tiny.2);
}

#[test]
fn younger_route_loses_only_shared_matches() {
    let (routes, told) = resolved_verdicts(
        &[],
        vec![
            model_route_candidate(
                "a",
                1,
                json!({"models": ["x"], "hosts": ["H.example.com"], "paths": ["/v/"]}),
            ),
            model_route_candidate(
                "b",
                2,
                json!({"models": ["x", "y"], "hosts": ["h.example.com"], "paths": ["/v"]}),
            ),
            // Model "x" belongs to "a", so "b" does not own that match; "b" owns the match of "y", which "c"
            // therefore loses.
            model_route_candidate(
                "c",
                3,
                json!({"models": ["y"], "hosts": ["h.example.com"], "paths": ["/v"]}),
            ),
        ],
    );
    assert_eq!(routes, ["models/a", "models/b"]);
    assert_eq!((told[1].1, told[2].1), ("PartlyConflicting", "Conflict"));
    assert!(
        told[1]
            .2
            .contains("1 of its 2 matches belong to other routes: ModelRoute models/a matches model \"x\""),
        "{}",
        told[1].2
    );
    assert!(told[2].2.contains("ModelRoute models/b matches"), "{}", told[2].2);
}

#[test]
fn name_is_unique_with_model_route_first() {
    let file = [route("models/taken", json!({"models": ["file"]}))];
    let theirs = |name, created, host: &str| {
        candidate(RouteKind::InterceptorRoute, name, created, json!({"hosts": [host]}))
    };
    let mut broken = model_route_candidate("broken", 5, json!({}));
    broken.route = Err("spec.target: no".into());
    let (routes, told) = resolved_verdicts(
        &file,
        vec![
            theirs("twin", 1, "a.example.com"),
            model_route_candidate("twin", 9, json!({"models": ["twin"]})),
            theirs("taken", 2, "b.example.com"),
            // The name belongs to the ModelRoute even while that is invalid: otherwise the key would change owners
            // with every correction.
            theirs("broken", 3, "c.example.com"),
            broken,
        ],
    );
    assert_eq!(routes, ["models/twin"]);
    let reasons: Vec<_> = told.iter().map(|(name, reason, _)| (name.as_str(), *reason)).collect();
    assert_eq!(
        reasons,
        [
            ("broken", "Invalid"),
            ("twin", "Accepted"),
            ("broken", "Conflict"),
            ("taken", "Conflict"),
            ("twin", "Conflict")
        ]
    );
    assert!(
        told[3].2.contains("the route \"models/taken\" of the proxy's configuration has this name"),
        "{}",
        told[3].2
    );
}

#[test]
fn limits_keep_the_oldest_routes() {
    let models: Vec<_> = (0..2048).map(|number| number.to_string()).collect();
    let large = |number: usize| {
        let hosts = [format!("a{number}.example.com"), format!("b{number}.example.com")];
        model_route_candidate(
            &number.to_string(),
            i64::try_from(number).unwrap(),
            json!({"models": models, "hosts": hosts}),
        )
    };
    let (routes, told) = resolved_verdicts(&[], (0..60).map(large).collect());
    // Each route makes 4,096 claims.
    assert_eq!(routes.len(), MAX_CLAIMS / 4096);
    assert_eq!(told.iter().filter(|(_, reason, _)| *reason == "Limit").count(), 60 - MAX_CLAIMS / 4096);
    assert_eq!(routes[0], "models/0");
}

/// Generates routes from a few words, so that conflicts are frequent.
fn candidates() -> impl Strategy<Value = Vec<RouteCandidate>> {
    let some = |words: &'static [&'static str]| prop::sample::subsequence(words, 0..words.len());
    let one = (
        0..2_u8,
        0..12_u8,
        0..4_i64,
        some(&["m", "n"]),
        some(&["a.b", "*.b", "A.b"]),
        some(&["/p", "/p/", "/q"]),
    );
    let one = one.prop_map(|(kind, name, created, models, hosts, paths)| {
        let kind = if kind == 0 { RouteKind::ModelRoute } else { RouteKind::InterceptorRoute };
        candidate(kind, &name.to_string(), created, json!({"models": models, "hosts": hosts, "paths": paths}))
    });
    prop::collection::vec(one, 0..12).prop_map(|mut all| {
        // As in a cluster, each kind has a name only once.
        all.sort_by(|one, other| one.object.cmp(&other.object));
        all.dedup_by(|one, other| one.object == other.object);
        all
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn resolution_ignores_arrival_order(
        (seen, shuffled) in candidates().prop_flat_map(|all| (Just(all.clone()), Just(all).prop_shuffle()))
    ) {
        prop_assert_eq!(resolved_verdicts(&[], seen), resolved_verdicts(&[], shuffled));
    }

    #[test]
    fn every_match_belongs_to_first_served_route(all in candidates()) {
        let Resolution { routes, verdicts } = resolve_conflicts(&[], all.clone());
        let mut owners: HashMap<Claim<'_>, &str> = HashMap::new();
        for route in &routes {
            let mut some = false;
            for claim in route.claims() {
                some |= *owners.entry(claim).or_insert(route.name.as_str()) == route.name.as_str();
            }
            prop_assert!(some, "{} is served and has nothing", route.name);
        }
        for candidate in &all {
            let verdict = &verdicts[&candidate.object];
            let (route, _) = candidate.route.as_ref().unwrap();
            let named_twice = all.iter().any(|other| other.object.key() == candidate.object.key() && other.object != candidate.object);
            if !verdict.is_accepted() && !named_twice {
                prop_assert!(route.claims().all(|claim| owners.contains_key(&claim)), "{} is refused, and nobody has it", candidate.object);
            }
        }
        let names: std::collections::HashSet<_> = routes.iter().map(|route| &route.name).collect();
        prop_assert_eq!(names.len(), routes.len());
    }

    #[test]
    fn verdict_is_independent_of_later_objects(all in candidates(), without in any::<prop::sample::Index>()) {
        // Names are unique here, since for equal names a ModelRoute takes precedence regardless of its age.
        let mut all = all;
        all.sort_by(|one, other| one.precedence().cmp(&other.precedence()));
        let mut names = std::collections::HashSet::new();
        all.retain(|candidate| names.insert(candidate.object.key()));
        prop_assume!(!all.is_empty());
        let before = resolve_conflicts(&[], all.clone());
        let gone = without.index(all.len());
        let earlier: Vec<_> = all[..gone].iter().map(|candidate| candidate.object.clone()).collect();
        all.remove(gone);
        let after = resolve_conflicts(&[], all);
        for object in earlier {
            prop_assert_eq!(&before.verdicts[&object], &after.verdicts[&object]);
        }
    }
}
