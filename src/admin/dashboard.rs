//! Dashboard at `/`: one page with embedded assets and no external resources.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use axum::{
    extract::Path,
    http::{
        HeaderMap, HeaderName, StatusCode,
        header::{
            CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, IF_NONE_MATCH, REFERRER_POLICY,
            X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
        },
    },
    response::{IntoResponse, Response},
};

/// Colours of the phases of a cold start in both themes, as CSS custom properties, shared by all pages that show cold
/// starts.
pub const THEME_CSS: &str = include_str!("dashboard/theme.css");

/// Content security policy: only embedded scripts and styles, requests to the own origin, no framing.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

struct Asset {
    name: &'static str,
    media_type: &'static str,
    text: &'static str,
}

const PAGE: Asset = Asset {
    name: "index.html",
    media_type: "text/html; charset=utf-8",
    text: include_str!("dashboard/index.html"),
};

const ASSETS: &[Asset] = &[
    css("theme.css", THEME_CSS),
    css("style.css", include_str!("dashboard/style.css")),
    css("charts.css", include_str!("dashboard/charts.css")),
    js("theme.js", include_str!("dashboard/theme.js")),
    js("app.js", include_str!("dashboard/app.js")),
    js("stream.js", include_str!("dashboard/stream.js")),
    js("dom.js", include_str!("dashboard/dom.js")),
    js("words.js", include_str!("dashboard/words.js")),
    js("routes.js", include_str!("dashboard/routes.js")),
    js("spark.js", include_str!("dashboard/spark.js")),
    js("failures.js", include_str!("dashboard/failures.js")),
    js("starts.js", include_str!("dashboard/starts.js")),
    js("waterfall.js", include_str!("dashboard/waterfall.js")),
    Asset { name: "icon.svg", media_type: "image/svg+xml", text: include_str!("dashboard/icon.svg") },
];

const fn css(name: &'static str, text: &'static str) -> Asset {
    Asset { name, media_type: "text/css; charset=utf-8", text }
}

const fn js(name: &'static str, text: &'static str) -> Asset {
    Asset { name, media_type: "text/javascript; charset=utf-8", text }
}

/// Serves `/`.
pub(super) async fn page(headers: HeaderMap) -> Response {
    PAGE.answer(&headers)
}

/// Serves `/dashboard/{name}`.
pub(super) async fn asset(Path(name): Path<String>, headers: HeaderMap) -> Response {
    match ASSETS.iter().find(|asset| asset.name == name) {
        Some(asset) => asset.answer(&headers),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

// === impl Asset ===

impl Asset {
    /// Serves the asset with an ETag. Browsers revalidate it on every load, since another version may be deployed at
    /// the address.
    fn answer(&self, headers: &HeaderMap) -> Response {
        let tag = self.tag();
        let known = headers
            .get_all(IF_NONE_MATCH)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .any(|known| known.trim().trim_start_matches("W/") == tag);
        let fields: [(HeaderName, &str); 7] = [
            (CONTENT_TYPE, self.media_type),
            (CONTENT_SECURITY_POLICY, POLICY),
            (X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (X_FRAME_OPTIONS, "DENY"),
            (REFERRER_POLICY, "no-referrer"),
            (CACHE_CONTROL, "no-cache"),
            (ETAG, &tag),
        ];
        match known {
            true => (StatusCode::NOT_MODIFIED, fields).into_response(),
            false => (fields, self.text).into_response(),
        }
    }

    fn tag(&self) -> String {
        let mut hasher = DefaultHasher::new();
        self.text.hash(&mut hasher);
        format!("\"{:016x}\"", hasher.finish())
    }
}

#[cfg(test)]
mod tests;
