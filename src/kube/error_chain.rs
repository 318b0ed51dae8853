//! Errors as one line of text.

/// Formats an error with its sources on one line, omitting repetitions. kube reports the cause of a lost connection
/// only as a source.
pub(super) fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    for cause in std::iter::successors(error.source(), |error| error.source()) {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use kube::runtime::watcher;

    use super::*;

    #[test]
    fn error_chain_lists_each_cause_once() {
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        let error = watcher::Error::WatchStartFailed(kube::Error::Service(Box::new(refused)));
        let text = error_chain(&error);
        assert_eq!(text.matches("connection refused").count(), 1, "{text}");
    }
}
