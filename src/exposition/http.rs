//! The little HTTP that the endpoint speaks: it reads the head of one request, and writes one HTTP/1.0 response.

use std::borrow::Cow;

use tiny_http::{HTTPVersion, Header, Response};

/// More headers than any scraper, probe or browser sends.
const MAX_HEADERS: usize = 64;

/// What the endpoint needs of a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Head<'a> {
    pub(super) method: &'a str,
    /// Without scheme, host, query and fragment.
    pub(super) path: &'a str,
    /// The host and port in a target such as `http://host:port/path`.
    pub(super) authority: Option<&'a str>,
    /// The value of the `Host` header.
    pub(super) host: Option<&'a [u8]>,
}

/// The outcome of parsing the bytes received so far.
pub(super) enum Parsed<'a> {
    /// The head has not ended yet.
    Incomplete,
    /// A request.
    Head(Head<'a>),
    /// No request that can be served, and the answer to it.
    Bad(Answer),
}

/// Parses the head of a request, of `limit` bytes at most. It ignores everything after the head.
pub(super) fn parse(bytes: &[u8], limit: usize) -> Parsed<'_> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let too_large = || Parsed::Bad(Answer::text(431, format!("a head of more than {limit} bytes\n")));
    match request.parse(bytes) {
        Ok(httparse::Status::Complete(length)) if length > limit => too_large(),
        Ok(httparse::Status::Complete(_)) => head(&request),
        Ok(httparse::Status::Partial) if bytes.len() > limit => too_large(),
        Ok(httparse::Status::Partial) => Parsed::Incomplete,
        Err(httparse::Error::Version) => {
            Parsed::Bad(Answer::text(505, "this server speaks HTTP/1.1 and HTTP/1.0\n"))
        }
        Err(httparse::Error::TooManyHeaders) => {
            Parsed::Bad(Answer::text(431, format!("more than {MAX_HEADERS} headers\n")))
        }
        Err(error) => Parsed::Bad(Answer::text(400, format!("not an HTTP request: {error}\n"))),
    }
}

fn head<'a>(request: &httparse::Request<'_, 'a>) -> Parsed<'a> {
    let mut hosts = request.headers.iter().filter(|header| header.name.eq_ignore_ascii_case("Host"));
    let host = hosts.next().map(|header| header.value);
    if hosts.any(|other| Some(other.value) != host) {
        return Parsed::Bad(Answer::text(400, "not an HTTP request: several different Host headers\n"));
    }
    let (authority, path) = parts_of(request.path.unwrap_or_default());
    Parsed::Head(Head { method: request.method.unwrap_or_default(), path, authority, host })
}

/// The authority, if there is one, and the path of a request's target. A proxy's client sends a whole URL.
fn parts_of(target: &str) -> (Option<&str>, &str) {
    let (authority, rest) = match target.split_once("://") {
        Some((scheme, rest)) if is_scheme(scheme) => {
            let (authority, rest) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
            // Before an @ stands a user's name.
            (Some(authority.rsplit('@').next().unwrap_or(authority)), rest)
        }
        _ => (None, target),
    };
    match rest.split(['?', '#']).next().unwrap_or(rest) {
        "" if authority.is_some() => (authority, "/"),
        path => (authority, path),
    }
}

/// Whether it is the scheme of a URL, as RFC 3986 defines it.
fn is_scheme(scheme: &str) -> bool {
    scheme.starts_with(|first: char| first.is_ascii_alphabetic())
        && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte))
}

/// A response before it is written.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    pub(super) code: u16,
    content_type: &'static str,
    /// One more header of this answer.
    extra: Option<(&'static str, &'static str)>,
    pub(super) body: Cow<'static, [u8]>,
}

impl Answer {
    /// Plain text for a person.
    pub(super) fn text(code: u16, body: impl Into<String>) -> Self {
        let body = body.into().into_bytes().into();
        Answer { code, content_type: "text/plain; charset=utf-8", extra: None, body }
    }

    /// Metrics in Prometheus' text format.
    pub(super) fn metrics(body: String) -> Self {
        let content_type = "text/plain; version=0.0.4; charset=utf-8";
        Answer { code: 200, content_type, extra: None, body: body.into_bytes().into() }
    }

    /// A JSON document.
    pub(super) fn json(body: Vec<u8>) -> Self {
        Answer { code: 200, content_type: "application/json", extra: None, body: body.into() }
    }

    /// An HTML document, and the policy on what it may load and do.
    pub(super) fn page(html: &'static str, policy: &'static str) -> Self {
        let extra = Some(("Content-Security-Policy", policy));
        Answer { code: 200, content_type: "text/html; charset=utf-8", extra, body: html.as_bytes().into() }
    }

    /// 405, with the methods that are allowed.
    pub(super) fn method_not_allowed() -> Self {
        Answer {
            extra: Some(("Allow", "GET, HEAD")),
            ..Answer::text(405, "this server answers GET and HEAD\n")
        }
    }

    /// 421, for a `Host` that may not read the status page.
    pub(super) fn misdirected() -> Self {
        let text =
            "the status page answers to an IP address, to localhost, and to names given with --status-host\n";
        Answer::text(421, text)
    }

    /// Appends the response to `output`. HTTP/1.0 means a `Content-Length`, and no further request.
    pub(super) fn write(self, head_only: bool, output: &mut Vec<u8>) {
        let length = self.body.len();
        let mut response = Response::new(self.code.into(), Vec::new(), &*self.body, Some(length), None)
            .with_header(constant("Content-Type", self.content_type))
            .with_header(constant("Cache-Control", "no-store"))
            .with_header(constant("X-Content-Type-Options", "nosniff"))
            .with_header(constant("Server", "millpond"));
        if let Some((name, value)) = self.extra {
            response.add_header(constant(name, value));
        }
        response
            .raw_print(output, HTTPVersion(1, 0), &[], head_only, None)
            .expect("writing to memory does not fail");
    }
}

/// A header made of literals. No byte that a client sent gets into a header.
fn constant(name: &'static str, value: &'static str) -> Header {
    Header::from_bytes(name, value).expect("a literal header is valid")
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: usize = 32 * 1024;

    fn code_of(bytes: &[u8]) -> Option<u16> {
        match parse(bytes, LIMIT) {
            Parsed::Bad(answer) => Some(answer.code),
            _ => None,
        }
    }

    #[test]
    fn a_head_is_incomplete_until_its_empty_line() {
        let whole = b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n";
        for end in 0..whole.len() {
            assert!(matches!(parse(&whole[..end], LIMIT), Parsed::Incomplete), "after {end} bytes");
        }
        let Parsed::Head(head) = parse(whole, LIMIT) else { panic!("it has ended") };
        let expected = Head { method: "GET", path: "/metrics", authority: None, host: Some(b"here") };
        assert_eq!(head, expected);
    }

    #[test]
    fn targets_in_every_form_have_a_path_and_may_have_an_authority() {
        for (target, authority, path) in [
            ("/metrics", None, "/metrics"),
            ("/metrics?x=1", None, "/metrics"),
            ("/?next=http://x/y", None, "/"),
            ("http://host:1/metrics?x", Some("host:1"), "/metrics"),
            ("http://host", Some("host"), "/"),
            ("http://host?x=/metrics", Some("host"), "/"),
            ("http://host#/metrics", Some("host"), "/"),
            ("http://host/#/metrics", Some("host"), "/"),
            ("HTTPS://[::1]:1/metrics", Some("[::1]:1"), "/metrics"),
            ("http://localhost@evil.example/", Some("evil.example"), "/"),
            ("http:///metrics", Some(""), "/metrics"),
            ("?a=http://x/metrics", None, ""),
            ("1http://x/metrics", None, "1http://x/metrics"),
            ("://x/metrics", None, "://x/metrics"),
            ("*", None, "*"),
        ] {
            assert_eq!(parts_of(target), (authority, path), "{target}");
        }
    }

    #[test]
    fn a_head_may_have_its_limit_and_no_byte_more() {
        let head = |length: usize| {
            let frame = "GET / HTTP/1.1\r\nX: \r\n\r\n".len();
            format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "a".repeat(length - frame)).into_bytes()
        };
        assert_eq!(code_of(&head(LIMIT)), None);
        assert_eq!(code_of(&head(LIMIT + 1)), Some(431));
        assert_eq!(code_of(&head(LIMIT + 100)[..=LIMIT]), Some(431), "before its end has arrived");
        assert_eq!(code_of(&head(LIMIT + 100)[..LIMIT]), None);
    }

    #[test]
    fn bytes_that_are_no_request_are_rejected_by_kind() {
        assert_eq!(code_of(b"GET / HTTP/2.0\r\n\r\n"), Some(505));
        assert_eq!(code_of(b"\x16\x03\x01\x02\x00\x01"), Some(400), "a TLS greeting");
        assert_eq!(code_of(b"GET\r\n\r\n"), Some(400));
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(65));
        assert_eq!(code_of(many.as_bytes()), Some(431));
    }

    #[test]
    fn several_different_hosts_are_no_request() {
        let hosts = |first: &str, second: &str| {
            code_of(format!("GET / HTTP/1.1\r\nHost: {first}\r\nA: b\r\nhOST:{second}\r\n\r\n").as_bytes())
        };
        assert_eq!(hosts("localhost", "localhost"), None);
        assert_eq!(hosts("localhost", "evil.example"), Some(400));
        assert_eq!(hosts("localhost", ""), Some(400));
        assert_eq!(hosts("", "localhost"), Some(400));
    }

    #[test]
    fn a_head_request_gets_the_length_and_no_body() {
        let mut output = Vec::new();
        Answer::text(200, "ok\n").write(true, &mut output);
        let text = String::from_utf8(output).expect("text");
        assert!(text.starts_with("HTTP/1.0 200 OK\r\n"), "{text}");
        assert!(text.contains("\r\nContent-Length: 3\r\n"), "{text}");
        assert!(text.ends_with("\r\n\r\n"), "{text}");
    }
}
