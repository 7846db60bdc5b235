//! Properties that hold for any bytes that a client sends to the side HTTP endpoint.
//!
//! [`check`] asserts them of one input. The tests below make up some thousands of inputs, and the fuzzer of `fuzz/`
//! finds any number. This module is built for these two only.

use prometheus::core::Collector;
use prometheus::{IntGauge, Registry};

use super::host::Hosts;
use super::shared::Shared;
use super::{Endpoint, MAX_HEAD, Route, page};
use crate::server::{Next, Service};

/// More than any answer has, head and body. Only the metrics of a registry may be longer, and the one here is small.
const MAX_ANSWER: usize = page::HTML.len() + 900;

/// Asserts every property for these bytes: sent at once, cut at these places (modulo the length), and with more after
/// them.
///
/// # Panics
///
/// If a property does not hold.
pub fn check(bytes: &[u8], cuts: &[usize]) {
    let at_once = exchange([bytes]);
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).collect();
    cuts.extend([0, bytes.len()]);
    cuts.sort_unstable();
    let pieces = exchange(cuts.windows(2).map(|ends| &bytes[ends[0]..ends[1]]));
    assert_eq!(pieces, at_once, "cut at {cuts:?}");
    if bytes.len() <= 128 {
        assert_eq!(exchange(bytes.chunks(1)), at_once, "byte for byte");
    }
    if let Some(answer) = &at_once {
        for more in [b"GET /nowhere HTTP/1.1\r\n\r\n".as_slice(), &[0xFF; 2 * MAX_HEAD]] {
            let longer = [bytes, more].concat();
            assert_eq!(exchange([longer.as_slice()]).as_ref(), Some(answer), "with more after it");
        }
        let start = bytes.iter().position(|byte| !b"\r\n".contains(byte)).unwrap_or(bytes.len());
        let is_bad = matches!(answer.code, 400 | 431 | 505);
        let no_body = bytes[start..].starts_with(b"HEAD ") && !is_bad;
        assert_eq!(answer.body.len(), if no_body { 0 } else { answer.length });
    } else {
        assert!(bytes.len() <= MAX_HEAD, "{} bytes, and no answer", bytes.len());
    }
}

/// As [`check`], cut at places that the last byte decides, because a fuzzer only has bytes.
///
/// # Panics
///
/// If a property does not hold.
pub fn check_bytes(bytes: &[u8]) {
    let seed = usize::from(bytes.last().copied().unwrap_or_default());
    let cuts: Vec<usize> = (1..=seed % 8).map(|cut| cut * (seed + 1)).collect();
    check(bytes, &cuts);
}

/// Sends the pieces to a new endpoint one after another, as a connection does. Returns the answer, if there is one.
fn exchange<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Option<Answer> {
    let gauge = IntGauge::new("level", "How high the water stands").expect("valid");
    let registry = Registry::new();
    registry.register(Box::new(gauge)).expect("the first of its name");
    let endpoint = Endpoint::new(
        registry,
        vec![
            ("/metrics", Route::Metrics(Shared::default())),
            ("/healthz", Route::Probe(Box::new(|| Ok(())))),
            ("/readyz", Route::Probe(Box::new(|| Err("warming up".to_owned())))),
            ("/", Route::Page),
        ],
        Hosts::default(),
    );
    let series = counted(&endpoint).len();
    let mut request = endpoint.open(([127, 0, 0, 1], 9).into());
    let mut answer = None;
    for piece in pieces.into_iter().filter(|piece| !piece.is_empty()) {
        let mut bytes = piece.to_vec();
        let next = endpoint.serve(&mut request, &mut bytes);
        let kept = request.head.len();
        assert!(kept <= MAX_HEAD + 1, "{kept} bytes are kept of a head");
        if next == Next::Close {
            answer = Some(Answer::read(&bytes));
            break;
        }
        assert!(bytes.is_empty(), "an answer, and the connection stays open");
    }
    let counted = counted(&endpoint);
    assert_eq!(counted.len(), series, "a request made a series");
    let ones: Vec<&(String, f64)> = counted.iter().filter(|(_, count)| *count > 0.0).collect();
    match &answer {
        Some(answer) => assert_eq!(ones, [&(answer.code.to_string(), 1.0)], "not counted once, by its code"),
        None => assert!(ones.is_empty(), "counted without an answer"),
    }
    answer
}

/// The requests counted by each series, with its code.
fn counted(endpoint: &Endpoint) -> Vec<(String, f64)> {
    let families = endpoint.requests.collect();
    let samples = families.iter().flat_map(prometheus::proto::MetricFamily::get_metric);
    samples
        .map(|sample| {
            let code = sample.get_label().iter().find(|label| label.name() == "code").expect("a label");
            (code.value().to_owned(), sample.get_counter().get_value())
        })
        .collect()
}

/// An answer without its date.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    code: u16,
    content_type: String,
    /// The value of `Content-Length`.
    length: usize,
    body: Vec<u8>,
}

impl Answer {
    /// Reads bytes that must be one response. It has the headers that every response has, and none that a client could
    /// have put there.
    fn read(bytes: &[u8]) -> Answer {
        let text = String::from_utf8_lossy(bytes);
        assert!(bytes.len() <= MAX_ANSWER, "{} bytes: {text}", bytes.len());
        let mut headers = [httparse::EMPTY_HEADER; 16];
        let mut response = httparse::Response::new(&mut headers);
        let end = match response.parse(bytes) {
            Ok(httparse::Status::Complete(end)) => end,
            other => panic!("no response ({other:?}): {text}"),
        };
        assert_eq!(response.version, Some(0), "{text}");
        let code = response.code.expect("parsed");
        assert!([200, 400, 404, 405, 421, 431, 503, 505].contains(&code), "{text}");
        let value = |name: &str| {
            let mut found = response.headers.iter().filter(|header| header.name == name);
            let value = found.next().map(|header| std::str::from_utf8(header.value).expect("text"));
            assert!(found.next().is_none(), "{name} twice: {text}");
            value
        };
        let content_type = value("Content-Type").expect("a type");
        let is_page = content_type == "text/html; charset=utf-8";
        let types = ["text/plain; charset=utf-8", "text/plain; version=0.0.4; charset=utf-8"];
        assert!(is_page || types.contains(&content_type), "{text}");
        assert_eq!(value("Content-Security-Policy"), is_page.then_some(page::POLICY));
        assert_eq!(value("Cache-Control"), Some("no-store"));
        assert_eq!(value("X-Content-Type-Options"), Some("nosniff"));
        assert_eq!(value("Server"), Some("millpond"));
        assert_eq!(value("Allow"), (code == 405).then_some("GET, HEAD"));
        let date = value("Date").expect("a date");
        assert!(date.len() == 29 && date.ends_with(" GMT"), "{date}");
        assert_eq!(response.headers.len(), 6 + usize::from(code == 405 || is_page), "one more: {text}");
        let length = value("Content-Length").and_then(|value| value.parse().ok()).expect("a length");
        Answer { code, content_type: content_type.to_owned(), length, body: bytes[end..].to_vec() }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::{Index, select};

    use super::*;

    /// One change to the bytes of a request.
    #[derive(Clone, Debug)]
    enum Harm {
        Change(u8),
        Drop,
        Insert(u8),
        CutOff,
    }

    fn harm() -> impl Strategy<Value = Harm> {
        prop_oneof![
            any::<u8>().prop_map(Harm::Change),
            Just(Harm::Drop),
            prop_oneof![any::<u8>(), select(b" \t\r\n:/?#\0".as_slice())].prop_map(Harm::Insert),
            Just(Harm::CutOff),
        ]
    }

    fn line_end() -> impl Strategy<Value = &'static str> {
        prop_oneof![9 => Just("\r\n"), 1 => Just("\n")]
    }

    /// Header lines. Some of them lie about bodies.
    fn header() -> impl Strategy<Value = String> {
        let lengths = prop_oneof![any::<u64>().prop_map(|number| number.to_string()), "[ -~]{0,30}"];
        prop_oneof![
            3 => "[A-Za-z0-9-]{1,20}: [!-~]([ -~]{0,40}[!-~])?",
            1 => lengths.prop_map(|length| format!("Content-Length: {length}x")),
            1 => "[0-9]{1,30}".prop_map(|length| format!("Content-Length: {length}")),
            1 => select(&["chunked", "identity", "gzip, chunked", "\tchunked", "xchunked"][..])
                .prop_map(|encoding| format!("Transfer-Encoding: {encoding}")),
            1 => Just("Expect: 100-continue".to_owned()),
            1 => Just("Connection: keep-alive, Upgrade".to_owned()),
        ]
    }

    /// Values of `Host`, and whether they may read the status page.
    fn host() -> impl Strategy<Value = (String, bool)> {
        let port = prop_oneof![Just(String::new()), any::<u16>().prop_map(|port| format!(":{port}"))];
        let name = prop_oneof![
            any::<std::net::Ipv4Addr>().prop_map(|address| (address.to_string(), true)),
            any::<std::net::Ipv6Addr>().prop_map(|address| (format!("[{address}]"), true)),
            select(&["localhost", "LOCALHOST", "localhost."][..]).prop_map(|name| (name.to_owned(), true)),
            "[a-z]{1,9}[.](example|localhost|127[.]0[.]0[.]1)".prop_map(|name| (name, false)),
        ];
        (name, port).prop_map(|((name, allowed), port)| (name + &port, allowed))
    }

    /// Requests that are almost right, of every length around the limit, with any bytes after them.
    fn almost_a_request() -> impl Strategy<Value = Vec<u8>> {
        let method = prop_oneof![
            4 => select(&["GET", "HEAD", "POST"][..]).prop_map(str::to_owned),
            1 => "[A-Z!#$%&'*+.^_`|~-]{0,12}",
        ];
        let target = prop_oneof![
            4 => select(&["/metrics", "/healthz", "/readyz", "/", "*", "http://a/metrics"][..]).prop_map(str::to_owned),
            1 => "(/|[*]|[a-z]{1,5}://)?[!-~]{0,40}",
        ];
        let version = prop_oneof![
            4 => select(&["HTTP/1.1", "HTTP/1.0"][..]).prop_map(str::to_owned),
            1 => "(HTTP)?/?[0-3]?[.]?[ -~]{0,4}",
        ];
        let host = || host().prop_map(|(host, _)| format!("Host: {host}"));
        let header = || prop_oneof![8 => header(), 1 => host()];
        let headers = prop_oneof![9 => vec(header(), 0..8), 1 => vec(header(), 60..70)];
        let filling = prop_oneof![8 => Just(0), 1 => 0..36_000_usize, 2 => 32_500..33_000_usize];
        let harms = prop_oneof![1 => Just(Vec::new()), 2 => vec((any::<Index>(), harm()), 1..4)];
        let rest = vec(any::<u8>(), 0..100);
        (method, target, version, headers, line_end(), filling, harms, rest).prop_map(
            |(method, target, version, headers, line_end, filling, harms, rest)| {
                let mut bytes = format!("{method} {target} {version}{line_end}").into_bytes();
                for header in headers {
                    bytes.extend(header.bytes().chain(line_end.bytes()));
                }
                if filling > 0 {
                    bytes.extend(b"Filling: ".iter().chain(vec![b'a'; filling].iter()));
                    bytes.extend(line_end.bytes());
                }
                bytes.extend(line_end.bytes());
                for (place, harm) in harms {
                    // A change before this one may have cut it off.
                    if bytes.is_empty() {
                        break;
                    }
                    let at = place.index(bytes.len());
                    match harm {
                        Harm::Change(by) => bytes[at] ^= by,
                        Harm::Drop => drop(bytes.remove(at)),
                        Harm::Insert(byte) => bytes.insert(at, byte),
                        Harm::CutOff => bytes.truncate(at),
                    }
                }
                bytes.extend(rest);
                bytes
            },
        )
    }

    #[test]
    fn the_seeds_of_the_fuzzer_hold() {
        let seeds = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/seeds/http_head");
        let seeds: Vec<_> =
            std::fs::read_dir(seeds).expect("seeds").map(|seed| seed.expect("a file").path()).collect();
        assert!(seeds.len() >= 20, "{} seeds", seeds.len());
        seeds.iter().for_each(|seed| check_bytes(&std::fs::read(seed).expect("a file")));
    }

    proptest! {
        #[test]
        fn any_bytes_get_one_valid_answer_or_wait_for_more(
            bytes in prop_oneof![1 => vec(any::<u8>(), 0..300), 9 => almost_a_request()],
            cuts in vec(any::<usize>(), 0..12),
        ) {
            check(&bytes, &cuts);
        }

        #[test]
        fn a_request_is_answered_by_method_and_path_and_no_header_changes_that(
            method in select(&["GET", "HEAD", "POST", "PUT", "TRACE", "CONNECT", "X"][..]),
            (target, path) in select(&[
                ("/metrics", "/metrics"),
                ("/metrics?name[]=x", "/metrics"),
                ("http://elsewhere:1/metrics", "/metrics"),
                ("/healthz#x", "/healthz"),
                ("/readyz", "/readyz"),
                ("/metrics/", "other"),
                ("//metrics", "other"),
                ("/METRICS", "other"),
                ("/../metrics", "other"),
                ("/%6detrics", "other"),
                ("*", "other"),
            ][..]),
            line_end in line_end(),
            headers in vec(header(), 0..=64),
            body in vec(any::<u8>(), 0..300),
        ) {
            let mut request = format!("{method} {target} HTTP/1.1{line_end}");
            for header in headers {
                request.push_str(&header);
                request.push_str(line_end);
            }
            request.push_str(line_end);
            prop_assume!(request.len() <= MAX_HEAD);
            let answer = exchange([request.as_bytes(), &body]).expect("a whole head");
            let get = matches!(method, "GET" | "HEAD");
            let code = match path {
                "other" => 404,
                _ if !get => 405,
                "/readyz" => 503,
                _ => 200,
            };
            prop_assert_eq!(answer.code, code);
            prop_assert_eq!(answer.content_type.contains("0.0.4"), path == "/metrics" && get);
        }

        #[test]
        fn the_page_is_only_for_allowed_hosts_and_all_else_for_any(
            (path, page) in select(&[("/", true), ("/metrics", false), ("/healthz", false)][..]),
            authority in proptest::option::of(host()),
            host in proptest::option::of(host()),
        ) {
            let url = authority.as_ref().map(|(name, _)| format!("http://{name}")).unwrap_or_default();
            let header = host.as_ref().map(|(name, _)| format!("Host: {name}\r\n")).unwrap_or_default();
            let request = format!("GET {url}{path} HTTP/1.1\r\n{header}\r\n");
            let allowed = [&authority, &host].into_iter().flatten().all(|(_, allowed)| *allowed);
            let answer = exchange([request.as_bytes()]).expect("a whole head");
            prop_assert_eq!(answer.code, if page && !allowed { 421 } else { 200 }, "{}", request);
        }
    }
}
