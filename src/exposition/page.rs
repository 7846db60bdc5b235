//! The status page: one document, compiled in, that needs nothing but `/status.json`.
//!
//! Its parts are `page/page.css`, `page/page.html` and `page/page.js`. The policy sent with it lets the browser run that
//! very script, apply that very style, and talk to nobody but the server it came from; a test holds the two hashes
//! to the files.

/// The document.
pub(super) const HTML: &str = concat!(
    "<!doctype html>\n<html lang=\"en\">\n<head>\n<style>",
    include_str!("page/page.css"),
    "</style>\n",
    include_str!("page/page.html"),
    "<script>",
    include_str!("page/page.js"),
    "</script>\n</body>\n</html>\n"
);

/// What the document may load and do.
pub(super) const POLICY: &str = concat!(
    "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; ",
    "style-src 'sha256-Qf3ngzsqLCMmrKjPRP0b0Tsg1yiNquahCjH+uZ4mPaM='; script-src 'sha256-YM/3bzI1HxG6yJLi+HIuDA9+MASxivp8CNkYK7Unpbs='"
);

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use sha2::{Digest as _, Sha256};

    use super::*;

    #[test]
    fn the_policy_allows_the_script_and_the_style_that_are_there() {
        for (directive, tag, file) in
            [("style-src", "style", "page.css"), ("script-src", "script", "page.js")]
        {
            let (_, rest) = HTML.split_once(&format!("<{tag}>")).expect("it begins");
            let (content, _) = rest.split_once(&format!("</{tag}>")).expect("it ends");
            let expected = format!("{directive} 'sha256-{}'", STANDARD.encode(Sha256::digest(content)));
            assert!(POLICY.contains(&expected), "page/{file} has changed, so the policy must say {expected}");
        }
    }

    #[test]
    fn nothing_of_the_page_comes_from_elsewhere() {
        let without_namespaces = HTML.replace("http://www.w3.org/2000/svg", "");
        for outside in ["http:", "https:", "//cdn", "@import", "url("] {
            assert!(!without_namespaces.contains(outside), "{outside}");
        }
        // The policy has the browser ignore these.
        for refused in [" style=", " onclick=", " onload=", "javascript:"] {
            assert!(!HTML.contains(refused), "{refused}");
        }
    }
}
