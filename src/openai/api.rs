//! Paths of the API, and whether they may wake a model server.

use http::Method;
use percent_encoding::percent_decode_str;

/// Meaning of a method and path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Api {
    /// Inference: may wake the model, which the body names.
    Work(ApiFormat),
    /// A response stored on a model server (`/v1/responses/{id}`), by id; available only while that server lives.
    Stored(String),
    /// State of a model server (`/version`, `/load`); available only while one runs.
    Server,
    /// `GET /v1/models`.
    Models,
    /// `GET /v1/models/{id}`, with the id decoded.
    Model(String),
    /// A health check of any kind, answered by the proxy.
    Probe,
    /// `GET /`: the health check of load balancers, and the start page of applications.
    Root,
    /// An API path with the wrong method; carries the allowed one.
    WrongMethod(&'static str),
    /// Not a path of the API.
    Unknown,
}

/// Format of a path's responses, whole and streamed, and location of the model name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ApiFormat {
    /// JSON, or `chat.completion.chunk` events.
    Chat,
    /// JSON, or `text_completion` events.
    Completion,
    /// JSON, or typed events of OpenAI's `/v1/responses`.
    Responses,
    /// JSON, or typed events of Anthropic's `/v1/messages`.
    Messages,
    /// JSON, never streamed.
    Plain,
    /// Text in any format, or events; the model is a field of a multipart form.
    Form,
    /// Any bytes, such as speech, even with `stream`.
    #[default]
    Opaque,
}

impl Api {
    /// Classifies a method and path.
    pub fn of(method: &Method, path: &str) -> Self {
        let work = match path {
            "/v1/chat/completions" => Some(ApiFormat::Chat),
            "/v1/completions" => Some(ApiFormat::Completion),
            "/v1/responses" => Some(ApiFormat::Responses),
            "/v1/messages" => Some(ApiFormat::Messages),
            "/v1/embeddings"
            | "/v1/messages/count_tokens"
            | "/tokenize"
            | "/detokenize"
            | "/pooling"
            | "/classify"
            | "/score"
            | "/v1/score"
            | "/rerank"
            | "/v1/rerank"
            | "/v2/rerank"
            | "/v1/chat/completions/batch"
            | "/v1/chat/completions/render" => Some(ApiFormat::Plain),
            "/v1/audio/transcriptions" | "/v1/audio/translations" => Some(ApiFormat::Form),
            "/v1/audio/speech" => Some(ApiFormat::Opaque),
            _ => None,
        };
        if let Some(shape) = work {
            return if method == Method::POST { Self::Work(shape) } else { Self::WrongMethod("POST") };
        }
        let get = method == Method::GET || method == Method::HEAD;
        match path {
            "/v1/models" if get => return Self::Models,
            "/v1/models" => return Self::WrongMethod("GET"),
            "/version" | "/load" if get => return Self::Server,
            "/version" | "/load" => return Self::WrongMethod("GET"),
            "/" if get => return Self::Root,
            "/health" | "/healthz" | "/livez" | "/readyz" | "/ping" if get => return Self::Probe,
            _ => {}
        }
        if let Some(id) = path.strip_prefix("/v1/models/") {
            // The SDKs escape the slash in a name such as `org/name`.
            let id = percent_decode_str(id).decode_utf8_lossy();
            return if get { Self::Model(id.into_owned()) } else { Self::WrongMethod("GET") };
        }
        let Some(stored) = path.strip_prefix("/v1/responses/") else { return Self::Unknown };
        let (id, of_it) = stored.split_once('/').map_or((stored, None), |(id, rest)| (id, Some(rest)));
        let is_stored = match of_it {
            None => get || method == Method::DELETE,
            Some("cancel") => method == Method::POST,
            Some("input_items") => get,
            Some(_) => false,
        };
        if is_stored { Self::Stored(id.to_owned()) } else { Self::Unknown }
    }
}

// === impl ApiFormat ===

impl ApiFormat {
    /// Returns whether `stream: true` yields server-sent events.
    pub const fn streams_events(self) -> bool {
        match self {
            Self::Chat | Self::Completion | Self::Responses | Self::Messages | Self::Form => true,
            Self::Plain | Self::Opaque => false,
        }
    }

    /// Returns whether a response that is not streamed is JSON.
    pub const fn is_json(self) -> bool {
        match self {
            Self::Chat | Self::Completion | Self::Responses | Self::Messages | Self::Plain => true,
            Self::Form | Self::Opaque => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_posts_to_api_paths_are_work() {
        assert_eq!(Api::of(&Method::POST, "/v1/chat/completions"), Api::Work(ApiFormat::Chat));
        assert_eq!(Api::of(&Method::GET, "/v1/chat/completions"), Api::WrongMethod("POST"));
        assert_eq!(Api::of(&Method::POST, "/v1/audio/transcriptions"), Api::Work(ApiFormat::Form));
        assert_eq!(Api::of(&Method::GET, "/v1/models/org/name"), Api::Model("org/name".into()));
        assert_eq!(Api::of(&Method::GET, "/v1/models/org%2Fname"), Api::Model("org/name".into()));
        for (method, path) in [
            (Method::GET, "/v1/responses/resp_1"),
            (Method::DELETE, "/v1/responses/resp_1"),
            (Method::POST, "/v1/responses/resp_1/cancel"),
            (Method::GET, "/v1/responses/resp_1/input_items"),
        ] {
            assert_eq!(Api::of(&method, path), Api::Stored("resp_1".into()), "{method} {path}");
        }
        assert_eq!(Api::of(&Method::GET, "/v1/responses/resp_1/cancel"), Api::Unknown);
        assert_eq!(Api::of(&Method::GET, "/version"), Api::Server);
        assert_eq!(Api::of(&Method::POST, "/load"), Api::WrongMethod("GET"));
        assert_eq!(Api::of(&Method::POST, "/v1/chat/completions/batch"), Api::Work(ApiFormat::Plain));
        assert_eq!(Api::of(&Method::GET, "/health"), Api::Probe);
        assert_eq!(Api::of(&Method::GET, "/"), Api::Root);
        for path in ["/wp-login.php", "/v1", "/v1/load_lora_adapter", "/v1/chat/completions/", "/metrics"] {
            assert_eq!(Api::of(&Method::POST, path), Api::Unknown, "{path}");
        }
    }
}
