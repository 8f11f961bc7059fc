//! The single-use tokens of streaming URLs: what a CRI call allowed, until somebody comes for it.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a URL is good for.
const LIFETIME: Duration = Duration::from_secs(60);
/// How many may be pending at once.
const MAX_PENDING: usize = 1000;
const RANDOM_BYTES: usize = 32;

#[derive(Debug, PartialEq, Eq)]
pub enum TokenError {
    TooMany,
    Random(rustix::io::Errno),
}

/// Pending requests by token.
pub struct Tokens<T> {
    pending: Mutex<Pending<T>>,
}

struct Pending<T> {
    requests: HashMap<String, (Instant, T)>,
    /// Tokens in the order they expire; taken ones are still in here.
    order: VecDeque<(Instant, String)>,
}

impl<T> Pending<T> {
    fn expire(&mut self, now: Instant) {
        while let Some((issued, token)) = self.order.front() {
            if self.requests.contains_key(token) {
                if now.duration_since(*issued) < LIFETIME {
                    return;
                }
                self.requests.remove(token);
            }
            self.order.pop_front();
        }
    }
}

impl<T> Tokens<T> {
    pub fn new() -> Self {
        let pending = Pending {
            requests: HashMap::new(),
            order: VecDeque::new(),
        };
        Self {
            pending: Mutex::new(pending),
        }
    }

    /// Keeps a request and gives out the token for it.
    pub fn issue(&self, request: T, now: Instant) -> Result<String, TokenError> {
        let token = random_token().map_err(TokenError::Random)?;
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        pending.expire(now);
        if pending.requests.len() >= MAX_PENDING {
            return Err(TokenError::TooMany);
        }
        // Tokens that were taken out of order stay in `order`: drop them before it grows.
        if pending.order.len() >= 2 * MAX_PENDING {
            let Pending { requests, order } = &mut *pending;
            order.retain(|(_, token)| requests.contains_key(token));
        }
        pending.order.push_back((now, token.clone()));
        pending.requests.insert(token.clone(), (now, request));
        Ok(token)
    }

    /// Whether the token is good for a request that `fits`; it stays good.
    pub fn is_good(&self, token: &str, now: Instant, fits: impl Fn(&T) -> bool) -> bool {
        let pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        let found = pending.requests.get(token);
        found.is_some_and(|(issued, request)| {
            now.duration_since(*issued) < LIFETIME && fits(request)
        })
    }

    /// The request of a token, once.
    pub fn take(&self, token: &str, now: Instant) -> Option<T> {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        let (issued, request) = pending.requests.remove(token)?;
        (now.duration_since(issued) < LIFETIME).then_some(request)
    }
}

/// 32 random bytes in hexadecimal: nothing in it needs escaping in a URL.
fn random_token() -> Result<String, rustix::io::Errno> {
    let mut bytes = [0; RANDOM_BYTES];
    // Up to 256 bytes come whole (getrandom(2)).
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_works_once_and_for_a_minute() {
        let tokens = Tokens::new();
        let start = Instant::now();
        let late = start + LIFETIME;
        let token = tokens.issue("a", start).unwrap();
        assert_eq!(token.len(), 64);
        assert!(tokens.is_good(&token, start, |request| *request == "a"));
        assert!(!tokens.is_good(&token, start, |request| *request == "b"));
        assert!(!tokens.is_good(&token, late, |_| true));
        assert_eq!(tokens.take(&token, start), Some("a"));
        assert_eq!(tokens.take(&token, start), None);
        let token = tokens.issue("b", start).unwrap();
        assert_eq!(tokens.take(&token, late), None);
        assert_eq!(tokens.take("nonsense", start), None);
    }

    #[test]
    fn pending_tokens_are_bounded_and_make_room_when_they_expire() {
        let tokens = Tokens::new();
        let start = Instant::now();
        let issued: Vec<_> = (0..MAX_PENDING)
            .map(|n| tokens.issue(n, start).unwrap())
            .collect();
        assert_eq!(tokens.issue(0, start), Err(TokenError::TooMany));
        assert_eq!(tokens.take(&issued[500], start), Some(500));
        tokens.issue(0, start).unwrap();
        assert_eq!(tokens.issue(0, start), Err(TokenError::TooMany));
        tokens.issue(0, start + LIFETIME).unwrap();
        assert_eq!(tokens.pending.lock().unwrap().requests.len(), 1);
    }

    #[test]
    fn taken_tokens_leave_nothing_behind() {
        let tokens = Tokens::new();
        let now = Instant::now();
        // One that stays keeps those after it in the queue.
        tokens.issue(0, now).unwrap();
        for n in 0..10_000 {
            let token = tokens.issue(n, now).unwrap();
            tokens.take(&token, now).unwrap();
        }
        assert!(tokens.pending.lock().unwrap().order.len() <= 2 * MAX_PENDING);
    }
}
