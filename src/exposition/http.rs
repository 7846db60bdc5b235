//! The little HTTP the endpoint speaks: a request's head in, one HTTP/1.0 response out.

use std::borrow::Cow;

use tiny_http::{HTTPVersion, Header, Response};

/// More headers than any scraper or probe sends.
const MAX_HEADERS: usize = 64;

/// What matters of a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Head<'a> {
    pub(super) method: &'a str,
    /// Without scheme, host, query and fragment.
    pub(super) path: &'a str,
}

/// What the bytes received so far amount to.
pub(super) enum Parsed<'a> {
    /// The head has not ended yet.
    Incomplete,
    /// A request.
    Head(Head<'a>),
    /// Something that can only be turned down.
    Bad(Answer),
}

/// Parses the head of a request, of `limit` bytes at most. Nothing after it is looked at.
pub(super) fn parse(bytes: &[u8], limit: usize) -> Parsed<'_> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let too_large = || Parsed::Bad(Answer::text(431, format!("a head of more than {limit} bytes\n")));
    match request.parse(bytes) {
        Ok(httparse::Status::Complete(length)) if length > limit => too_large(),
        Ok(httparse::Status::Complete(_)) => {
            let method = request.method.unwrap_or_default();
            let path = path_of(request.path.unwrap_or_default());
            Parsed::Head(Head { method, path })
        }
        Ok(httparse::Status::Partial) if bytes.len() > limit => too_large(),
        Ok(httparse::Status::Partial) => Parsed::Incomplete,
        Err(httparse::Error::Version) => {
            Parsed::Bad(Answer::text(505, "HTTP/1.1 and HTTP/1.0 are spoken here\n"))
        }
        Err(httparse::Error::TooManyHeaders) => {
            Parsed::Bad(Answer::text(431, format!("more than {MAX_HEADERS} headers\n")))
        }
        Err(error) => Parsed::Bad(Answer::text(400, format!("not an HTTP request: {error}\n"))),
    }
}

/// The path of a request's target, which may also come as a whole address.
fn path_of(target: &str) -> &str {
    let target = match target.split_once("://") {
        Some((_, rest)) if !target.starts_with('/') => rest.find('/').map_or("/", |slash| &rest[slash..]),
        _ => target,
    };
    target.split(['?', '#']).next().unwrap_or(target)
}

/// A response before it is written.
pub(super) struct Answer {
    pub(super) code: u16,
    content_type: &'static str,
    /// One more header, where there is one.
    extra: Option<(&'static str, &'static str)>,
    body: Cow<'static, [u8]>,
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

    /// An HTML document, and what it may load and do.
    pub(super) fn page(html: &'static str, policy: &'static str) -> Self {
        let extra = Some(("Content-Security-Policy", policy));
        Answer { code: 200, content_type: "text/html; charset=utf-8", extra, body: html.as_bytes().into() }
    }

    /// 405, saying what is allowed.
    pub(super) fn method_not_allowed() -> Self {
        Answer { extra: Some(("Allow", "GET, HEAD")), ..Answer::text(405, "GET and HEAD are served here\n") }
    }

    /// Writes the response to the end of `output`. HTTP/1.0 means a `Content-Length` and no further request.
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

/// A header made of literals: nothing a client sent ever gets into one.
fn constant(name: &'static str, value: &'static str) -> Header {
    Header::from_bytes(name, value).expect("a literal header is valid")
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: usize = 8192;

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
        assert!(matches!(parse(whole, LIMIT), Parsed::Head(Head { method: "GET", path: "/metrics" })));
    }

    #[test]
    fn targets_in_every_form_have_a_path() {
        for (target, path) in [
            ("/metrics", "/metrics"),
            ("/metrics?x=1", "/metrics"),
            ("/?next=http://x/y", "/"),
            ("http://host:1/metrics?x", "/metrics"),
            ("http://host", "/"),
            ("*", "*"),
        ] {
            assert_eq!(path_of(target), path, "{target}");
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
        assert_eq!(code_of(&head(LIMIT + 100)[..=LIMIT]), Some(431), "before its end has come");
        assert_eq!(code_of(&head(LIMIT + 100)[..LIMIT]), None);
    }

    #[test]
    fn what_is_no_request_is_turned_down_by_kind() {
        assert_eq!(code_of(b"GET / HTTP/2.0\r\n\r\n"), Some(505));
        assert_eq!(code_of(b"\x16\x03\x01\x02\x00\x01"), Some(400), "a TLS greeting");
        assert_eq!(code_of(b"GET\r\n\r\n"), Some(400));
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(65));
        assert_eq!(code_of(many.as_bytes()), Some(431));
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
