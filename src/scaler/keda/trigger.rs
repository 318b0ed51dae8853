//! Which route a trigger means.

use std::{fmt, sync::Arc};

use tonic::Status;

use super::proto::ScaledObjectRef;
use crate::admission::{Gate, Gates};

/// The trigger of a ScaledObject, by the route that it names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Trigger {
    namespace: String,
    object: String,
    kind: Kind,
    name: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// `route`: a ModelRoute of the ScaledObject's namespace, or a route of our file.
    Route,
    /// `interceptorRoute`, as with the HTTP Add-on.
    InterceptorRoute,
}

// === impl Trigger ===

impl Trigger {
    /// What the metadata says.
    pub(super) fn of(object: &ScaledObjectRef) -> Result<Self, Status> {
        let named = |kind: Kind| {
            let name = object.scaler_metadata.get(kind.key()).map(|name| name.trim());
            name.filter(|name| !name.is_empty()).map(|name| (kind, name))
        };
        let invalid = |what: &str| {
            Status::invalid_argument(format!(
                "the trigger of ScaledObject {}/{} {what} in its metadata; set `route` to the name of a ModelRoute of \
                 that namespace or of a route of anteroom's file, or `interceptorRoute` to that of an InterceptorRoute",
                object.namespace, object.name
            ))
        };
        let (kind, name) = match (named(Kind::Route), named(Kind::InterceptorRoute)) {
            (Some(named), None) | (None, Some(named)) => named,
            (None, None) => return Err(invalid("names no route")),
            (Some(_), Some(_)) => return Err(invalid("has both `route` and `interceptorRoute`")),
        };
        Ok(Self {
            namespace: object.namespace.clone(),
            object: object.name.clone(),
            kind,
            name: name.to_owned(),
        })
    }

    /// The name that it gives the route.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The route: that of the namespace, and only where there is none, that of the file.
    pub(super) fn find(&self, routes: &Gates) -> Option<Arc<Gate>> {
        let of_namespace = routes.get(format!("{}/{}", self.namespace, self.name).as_str());
        // A name may have a namespace in it. The route of another one is not this ScaledObject's to scale by.
        let is_elsewhere =
            self.name.split_once('/').is_some_and(|(namespace, _)| namespace != self.namespace);
        let is_of_file = self.kind == Kind::Route && !is_elsewhere;
        let of_file = || routes.get(self.name.as_str()).filter(|_| is_of_file);
        of_namespace.or_else(of_file).cloned()
    }

    /// What is said when there is no such route.
    pub(super) fn unknown(&self, routes: &Gates) -> Status {
        const SHOWN: usize = 10;
        let known: Vec<_> = routes.keys().take(SHOWN).map(|key| key.as_str()).collect();
        let more = if routes.len() > SHOWN { ", ..." } else { "" };
        let wanted = match self.kind {
            Kind::Route => {
                format!("neither a ModelRoute {}/{} nor a route of the file", self.namespace, self.name)
            }
            Kind::InterceptorRoute => format!("no InterceptorRoute {}/{}", self.namespace, self.name),
        };
        Status::not_found(format!(
            "{self}: there is {wanted} that anteroom serves; create it, or correct `{}` in the trigger's metadata \
             (served: {}{more})",
            self.kind.key(),
            if known.is_empty() { "none".to_owned() } else { known.join(", ") },
        ))
    }
}

impl fmt::Display for Trigger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { namespace, object, kind, name } = self;
        write!(f, "ScaledObject {namespace}/{object}, {} \"{name}\"", kind.key())
    }
}

// === impl Kind ===

impl Kind {
    const fn key(self) -> &'static str {
        match self {
            Self::Route => "route",
            Self::InterceptorRoute => "interceptorRoute",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        admission::Directory,
        coldstart::ColdStarts,
        domain::{Policy, RouteKey},
    };

    fn trigger(metadata: &[(&str, &str)]) -> Result<Trigger, Status> {
        Trigger::of(&ScaledObjectRef {
            name: "vllm".into(),
            namespace: "ml".into(),
            scaler_metadata: metadata.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect(),
        })
    }

    fn routes(keys: &[&str]) -> Gates {
        let directory = Directory::default();
        let gate = |key: &&str| Gate::new(RouteKey::from(*key), Policy::default(), ColdStarts::new(|_| {}));
        directory.publish(keys.iter().map(gate));
        directory.gates()
    }

    #[tokio::test]
    async fn a_route_of_the_namespace_goes_before_one_of_the_file() {
        let route = trigger(&[("scalerAddress", "anteroom:9090"), ("route", " llama ")]).unwrap();
        let theirs = trigger(&[("interceptorRoute", "llama")]).unwrap();
        let found =
            |trigger: &Trigger, keys: &[&str]| trigger.find(&routes(keys)).map(|gate| gate.key().to_string());
        for (keys, by_route, by_theirs) in [
            (&["llama", "ml/llama"][..], Some("ml/llama"), Some("ml/llama")),
            (&["llama", "other/llama"], Some("llama"), None),
            (&["other/llama"], None, None),
        ] {
            assert_eq!(found(&route, keys).as_deref(), by_route, "{keys:?}");
            assert_eq!(found(&theirs, keys).as_deref(), by_theirs, "{keys:?}");
        }
    }

    #[tokio::test]
    async fn a_name_that_has_a_namespace_leads_into_no_other_one() {
        for metadata in ["route", "interceptorRoute"] {
            let trigger = trigger(&[(metadata, "other/llama")]).unwrap();
            assert!(trigger.find(&routes(&["other/llama"])).is_none(), "{metadata}");
        }
    }

    #[tokio::test]
    async fn what_is_wrong_names_the_object_the_route_and_the_way_out() {
        for metadata in [&[][..], &[("route", "")], &[("route", "a"), ("interceptorRoute", "b")]] {
            let status = trigger(metadata).unwrap_err();
            assert_eq!(status.code(), tonic::Code::InvalidArgument);
            for part in ["ScaledObject ml/vllm", "`route`", "`interceptorRoute`", "ModelRoute"] {
                assert!(status.message().contains(part), "{}", status.message());
            }
        }
        let status = trigger(&[("route", "lama")]).unwrap().unknown(&routes(&["llama"]));
        assert_eq!(
            (status.code(), status.message()),
            (
                tonic::Code::NotFound,
                "ScaledObject ml/vllm, route \"lama\": there is neither a ModelRoute ml/lama nor a route of the file \
                 that anteroom serves; create it, or correct `route` in the trigger's metadata (served: llama)"
            )
        );
    }
}
