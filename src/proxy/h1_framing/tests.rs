use proptest::prelude::*;

use super::*;

/// Returns the heads and bytes that pass if `bytes` arrive in pieces of `cut`.
fn passes(bytes: &[u8], cut: usize) -> (u32, usize) {
    let mut framing = RequestFraming::default();
    let mut passed = 0;
    for piece in bytes.chunks(cut) {
        let taken = framing.admit_bytes(piece);
        passed += taken;
        if taken < piece.len() {
            assert_eq!(framing.admit_bytes(b"more"), 0);
            break;
        }
    }
    (framing.heads, passed)
}

fn chunked(body: &str) -> String {
    format!("POST / HTTP/1.1\r\nHost: a\r\nTRANSFER-encoding: \tChunked \r\n\r\n{body}")
}

const NEXT: &str = "GET / HTTP/1.1\r\n\r\n";

#[test]
fn framing_is_independent_of_read_sizes() {
    let get = "GET / HTTP/1.1\r\nHost: a\r\nTransfer: x\r\nContent-Lengths: 3\r\n\r\n";
    let with_both = format!("POST / HTTP/1.1\r\nContent-Length: 9\r\n{}", &chunked("0\r\n\r\n")[17..]);
    for (bytes, heads) in [
        (get.to_owned(), 1),
        (get.repeat(3), 3),
        (format!("\r\n\n{get}\r\n\r\n{get}"), 2),
        (get.replace('\r', ""), 1),
        (format!("POST / HTTP/1.1\r\ncontent-length: 4\r\nContent-Length: 4\r\n\r\n\n\r\n\r{get}"), 2),
        (format!("POST / HTTP/1.1\r\nContent-Length:0\r\n\r\n{get}"), 2),
        (chunked(&format!("A\r\n\n\n\n\n\n\n\n\n\n\n\r\n00\t;x=y\r\n\r\n{get}")), 2),
        (chunked(&format!("2 \r\n\r\n\r\n0\r\nX-T: 1\r\nY: 2\r\n\r\n{get}")), 2),
        (format!("{with_both}{get}"), 2),
    ] {
        for cut in [1, 2, 3, 7, 40, 1000] {
            assert_eq!(passes(bytes.as_bytes(), cut), (heads, bytes.len()), "{bytes:?} in pieces of {cut}");
        }
    }
}

#[test]
fn ambiguous_framing_is_cut_off() {
    for bad in [
        "0\r\n|\n",
        "0\r\nX-T: 1|\n\n",
        "0\r\nA: 1\r\n|\n",
        "0\r\nA: 1\r\nX: 1|\n\r\n",
        "0\r\nA: 1\r|x",
        "0\r\n\r|x",
        "0|\n\r\n",
        "1|\nx\r\n0\r\n\r\n",
        "1;a|\nb\r\nx\r\n0\r\n\r\n",
        "1;a\r|b\r\nx\r\n0\r\n\r\n",
        "1\r\nx|\n0\r\n\r\n",
        "1\r\nx\r|0\r\n\r\n",
        "1\r\nx|0\r\n\r\n",
        "|\r\n",
        "|;x\r\n",
        "| 1\r\n",
        "|-1\r\n",
        "1 |1\r\n",
        "0|x0\r\n",
        "0000000000000000|0\r\n\r\n",
    ] {
        let bytes = chunked(&bad.replace('|', "")) + NEXT;
        let end = chunked(bad.split('|').next().unwrap()).len();
        for cut in [1, 2, 3, 7, 1000] {
            let (heads, passed) = passes(bytes.as_bytes(), cut);
            assert_eq!((heads, passed), (1, end), "{bad:?} in pieces of {cut}");
        }
    }
    // Nothing passes after such a head; hyper or the request path rejects it.
    for lines in [
        "Transfer-Encoding: gzip, chunked\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        "Content-Length: +1\r\n",
        "Content-Length:\r\n",
        "Content-Length: 1, 1\r\n",
        "Content-Length: 1\r\nContent-Length: 2\r\n",
        "Content-Length: 18446744073709551616\r\n",
    ] {
        let head = format!("POST / HTTP/1.1\r\n{lines}\r\n");
        for cut in [1, 7, 1000] {
            let passed = passes(format!("{head}{NEXT}").as_bytes(), cut);
            assert_eq!(passed, (1, head.len()), "{lines:?} in pieces of {cut}");
        }
    }
    // Whitespace is limited only for lines that arrive in pieces.
    let head =
        format!("POST / HTTP/1.1\r\nContent-Length: {}1\r\n\r\n", " ".repeat(2 * MAX_HEADER_LINE_BYTES));
    assert_eq!(passes(format!("{head}xx").as_bytes(), 100), (1, head.len()));
}

#[test]
fn trailers_are_bounded() {
    let trailers = |size: usize| chunked(&format!("0\r\nX: {}\r\n\r\n{NEXT}", "x".repeat(size)));
    let passes = |size: usize| passes(trailers(size).as_bytes(), 1000).0;
    assert_eq!((passes(MAX_TRAILER_BYTES - 10), passes(MAX_TRAILER_BYTES)), (2, 1));
}

#[test]
fn later_request_is_recognized() {
    let mut framing = RequestFraming::default();
    let mut comes = |bytes: &str, begun| {
        assert_eq!(framing.admit_bytes(bytes.as_bytes()), bytes.len());
        framing.is_beyond(begun)
    };
    assert!(!comes("POST / HTTP/1.1\r\nContent-Length: 5\r\n", 1));
    assert!(!comes("\r\n1234", 1), "its body");
    assert!(comes("5", 1));
    assert!(comes("POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\n1", 1), "body of the later request");
    assert!(!comes("2", 2));
}

#[test]
fn head_bytes_count_until_the_head_is_complete() {
    let mut framing = RequestFraming::default();
    let mut comes = |bytes: &str| {
        assert_eq!(framing.admit_bytes(bytes.as_bytes()), bytes.len());
        framing.head_bytes()
    };
    assert_eq!(comes("\r\nGET / HTTP/1.1\r\n"), 18);
    assert_eq!(comes("Cookie: a"), 27);
    assert_eq!(comes(&"b".repeat(1000)), 1027);
    assert_eq!(comes("\r\n\r\n"), 0);
    assert_eq!(comes("POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\n1234"), 0);
    assert_eq!(comes("5GET"), 3, "head of the next request");
}

proptest! {
    #[test]
    fn random_cuts_pass_the_same_bytes(pieces in prop::collection::vec(prop::sample::select(vec![
        "POST / HTTP/1.1\r\n", "Transfer-Encoding: chunked\r\n", "Content-Length: 3\r\n", "Host: a\r\n", "\r\n", "\n", "\r",
        "0\r\n", "3\r\nabc\r\n", "abc", "X: y\r\n", ";ext", "\r\n\r\n", "1f", "content-length: 3\n", "t",
    ]), 0..24), cut in 1..9_usize) {
        let bytes = pieces.concat();
        prop_assert_eq!(passes(bytes.as_bytes(), cut), passes(bytes.as_bytes(), usize::MAX));
    }
}
