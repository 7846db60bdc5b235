//! One rendering for all the requests that wait for it.
//!
//! To render the metrics takes longer than all else that a request needs, and up to milliseconds with thousands of
//! workers. When many clients ask at once, each would wait for one rendering per client before it. Instead, a request
//! gets what was rendered for another if that rendering began after its own connection was accepted.
//!
//! So an answer is never older than the connection it is sent on. A scraper that is alone always gets a new rendering.

use std::sync::Mutex;
use std::time::Instant;

use super::http::Answer;
use crate::sync::lock;

/// What was rendered last.
#[derive(Debug, Default)]
pub(super) struct Shared {
    /// When the rendering began, and its outcome. Written and read by the endpoint's workers, which wait for each other.
    last: Mutex<Option<(Instant, Answer)>>,
}

impl Shared {
    /// What `render` makes, for a connection that was accepted at this time.
    pub(super) fn get(&self, accepted: Instant, render: impl FnOnce() -> Answer) -> Answer {
        let mut last = lock(&self.last);
        if let Some((began, answer)) = &*last
            && *began > accepted
        {
            return answer.clone();
        }
        let began = Instant::now();
        let answer = render();
        *last = Some((began, answer.clone()));
        answer
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn only_a_rendering_that_began_after_the_accept_is_shared() {
        let shared = Shared::default();
        let render = |body: &'static str| move || Answer::text(200, body);
        let body = |accepted, text| shared.get(accepted, render(text)).body;
        let before = Instant::now();
        while Instant::now() == before {}
        assert_eq!(*body(before, "first"), *b"first");
        assert_eq!(*body(before, "second"), *b"first", "it was there when the first was rendered");
        let after = Instant::now() + Duration::from_secs(1);
        assert_eq!(*body(after, "third"), *b"third", "what is there is older");
        assert_eq!(*body(before, "fourth"), *b"third", "the latest is shared");
    }
}
