//! Trigger of a ScaledObject: parses its metadata and finds its route.

use std::{fmt, sync::Arc};

use tonic::Status;

use super::proto::ScaledObjectRef;
use crate::{
    admission::{Gate, Gates},
    domain::{Counting, Intercept, Scaling},
};

/// Trigger of a ScaledObject. Its route need not exist yet; a name that no route can have is rejected, which also bounds
/// the size of a trigger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Trigger {
    namespace: String,
    object: String,
    kind: TriggerKind,
    name: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TriggerKind {
    /// `route`: a ModelRoute of the ScaledObject's namespace, or a route of the file.
    Route,
    /// `interceptorRoute`: an InterceptorRoute of the ScaledObject's namespace, as with the HTTP Add-on.
    InterceptorRoute,
}

/// Longest name of a cluster object or a route of the file, in bytes.
const MAX_NAME_BYTES: usize = 253;

// === impl Trigger ===

impl Trigger {
    /// Parses the metadata.
    ///
    /// # Errors
    /// If it names no route, or one that cannot exist.
    pub(super) fn of(object: &ScaledObjectRef) -> Result<Self, Status> {
        // First, so that no overlong name is stored, returned or logged.
        if [&object.namespace, &object.name].iter().any(|name| name.len() > MAX_NAME_BYTES) {
            return Err(Status::invalid_argument(format!(
                "the ScaledObject's namespace or name is longer than {MAX_NAME_BYTES} bytes, which no object's is"
            )));
        }
        let named = |kind: TriggerKind| {
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
        let (kind, name) = match (named(TriggerKind::Route), named(TriggerKind::InterceptorRoute)) {
            (Some(named), None) | (None, Some(named)) => named,
            (None, None) => return Err(invalid("names no route")),
            (Some(_), Some(_)) => return Err(invalid("has both `route` and `interceptorRoute`")),
        };
        if let Some(why) = kind.invalid_name(name, &object.namespace) {
            return Err(invalid(&format!("names a route that cannot be there: {why}")));
        }
        Ok(Self {
            namespace: object.namespace.clone(),
            object: object.name.clone(),
            kind,
            name: name.to_owned(),
        })
    }

    /// Returns namespace and name of the ScaledObject.
    pub(super) fn object(&self) -> (&str, &str) {
        (&self.namespace, &self.object)
    }

    /// Returns the default scaling of the route, for use until it exists.
    pub(super) fn expected_scaling(&self) -> Scaling {
        match self.kind {
            TriggerKind::Route => Scaling::default(),
            TriggerKind::InterceptorRoute => Scaling {
                target: Intercept::DEFAULT_TARGET,
                counting: Counting::Concurrency,
                ..Scaling::default()
            },
        }
    }

    /// Returns the route's name in the metadata.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Finds the route: one of the namespace first, else one of the file.
    pub(super) fn find(&self, routes: &Gates) -> Option<Arc<Gate>> {
        let of_namespace = routes.get(format!("{}/{}", self.namespace, self.name).as_str());
        let of_file = || routes.get(self.name.as_str()).filter(|_| self.kind == TriggerKind::Route);
        of_namespace.or_else(of_file).cloned()
    }

    /// Describes an unknown route for the log.
    pub(super) fn describe_unknown(&self, routes: &Gates) -> String {
        const MAX_SHOWN: usize = 10;
        let known: Vec<_> = routes.keys().take(MAX_SHOWN).map(|key| key.as_str()).collect();
        let more = if routes.len() > MAX_SHOWN { ", ..." } else { "" };
        let wanted = match self.kind {
            TriggerKind::Route => {
                format!("neither a ModelRoute {}/{} nor a route of the file", self.namespace, self.name)
            }
            TriggerKind::InterceptorRoute => format!("no InterceptorRoute {}/{}", self.namespace, self.name),
        };
        format!(
            "{self}: there is {wanted} that anteroom serves; create it, or correct `{}` in the trigger's metadata \
             (served: {}{more})",
            self.kind.key(),
            if known.is_empty() { "none".to_owned() } else { known.join(", ") },
        )
    }
}

impl fmt::Display for Trigger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { namespace, object, kind, name } = self;
        write!(f, "ScaledObject {namespace}/{object}, {} \"{name}\"", kind.key())
    }
}

/// Shortens a name for use in a response.
pub(super) fn shortened(name: &str) -> &str {
    &name[..name.floor_char_boundary(MAX_NAME_BYTES)]
}

// === impl TriggerKind ===

impl TriggerKind {
    const fn key(self) -> &'static str {
        match self {
            Self::Route => "route",
            Self::InterceptorRoute => "interceptorRoute",
        }
    }

    /// Returns the reason why no route can have this name.
    fn invalid_name(self, name: &str, namespace: &str) -> Option<String> {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if name.len() > MAX_NAME_BYTES {
            return Some(format!("its name is longer than {MAX_NAME_BYTES} bytes"));
        }
        // A name may contain a namespace, but only the ScaledObject's own.
        let bare = match name.split_once('/') {
            Some((other, _)) if other != namespace || self == Self::InterceptorRoute => {
                return Some(format!("\"{name}\" is not of namespace {namespace}"));
            }
            Some((_, bare)) => bare,
            None => name,
        };
        let is_name = bare.bytes().all(|byte| is_plain(byte) || byte == b'/');
        (!is_name).then(|| "a name has letters, digits and -_./ only".to_owned())
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
    async fn route_of_the_namespace_precedes_one_of_the_file() {
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
    async fn impossible_route_name_is_rejected() {
        let long = "x".repeat(254);
        for (key, name) in [
            ("route", "other/llama"),
            ("interceptorRoute", "other/llama"),
            ("interceptorRoute", "ml/llama"),
            ("route", "no name"),
            ("route", "lläma"),
            ("route", &long),
        ] {
            let status = trigger(&[(key, name)]).unwrap_err();
            assert_eq!(status.code(), tonic::Code::InvalidArgument, "{name}");
            assert!(status.message().contains("cannot be there"), "{}", status.message());
        }
        for name in ["llama", "Llama_3.1", "ml/llama", &long[..253]] {
            assert!(trigger(&[("route", name)]).is_ok(), "{name}");
        }
        let object = ScaledObjectRef {
            name: long,
            scaler_metadata: [("route".into(), "llama".into())].into(),
            ..ScaledObjectRef::default()
        };
        let status = Trigger::of(&object).unwrap_err();
        assert_eq!(status.code(), tonic::Code::InvalidArgument);
        // An overlong name is not repeated in errors.
        let huge = ScaledObjectRef { name: "x".repeat(60_000), ..ScaledObjectRef::default() };
        for object in [object, huge] {
            assert!(Trigger::of(&object).unwrap_err().message().len() < 200);
        }
    }

    #[tokio::test]
    async fn errors_name_the_object_and_the_remedy() {
        for metadata in [&[][..], &[("route", "")], &[("route", "a"), ("interceptorRoute", "b")]] {
            let status = trigger(metadata).unwrap_err();
            assert_eq!(status.code(), tonic::Code::InvalidArgument);
            for part in ["ScaledObject ml/vllm", "`route`", "`interceptorRoute`", "ModelRoute"] {
                assert!(status.message().contains(part), "{}", status.message());
            }
        }
        assert_eq!(
            trigger(&[("route", "lama")]).unwrap().describe_unknown(&routes(&["llama"])),
            "ScaledObject ml/vllm, route \"lama\": there is neither a ModelRoute ml/lama nor a route of the file \
             that anteroom serves; create it, or correct `route` in the trigger's metadata (served: llama)"
        );
    }
}
