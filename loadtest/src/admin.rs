//! Asks Anteroom's admin listener, one short connection a question.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// How long an answer may take: the metrics of thousands of routes are some megabytes.
const PATIENCE: Duration = Duration::from_secs(20);

/// The status and the body of `GET path`.
pub(crate) fn get(admin: SocketAddr, path: &str) -> io::Result<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&admin, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, format!("no answer to GET {path}"));
    let answer = String::from_utf8(answer).map_err(|_| malformed())?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(malformed)?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).ok_or_else(malformed)?;
    Ok((status, body.to_owned()))
}

/// Whether it says that it is ready to serve.
pub(crate) fn is_ready(admin: SocketAddr) -> bool {
    get(admin, "/readyz").is_ok_and(|(status, _)| status == 200)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_its_status_and_its_body() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let answering = std::thread::spawn(move || {
            for answer in ["HTTP/1.1 503 No\r\ncontent-length: 2\r\n\r\nno", "HTTP/1.1 503 No"] {
                let (mut stream, _) = listener.accept().unwrap();
                // The question is read, or closing would reset the connection.
                let mut question = [0; 1024];
                assert!(stream.read(&mut question).unwrap() > 0);
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        assert_eq!(get(address, "/readyz").unwrap(), (503, "no".into()));
        assert!(!is_ready(address), "that answer is cut");
        answering.join().unwrap();
    }
}
