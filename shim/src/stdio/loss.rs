//! Output that its file did not take: how much, and what to tell people about it.
//!
//! A full disk must neither stop the process nor go unnoticed. Its begin and its end are news, not
//! every write in between, and on a disk that is full by turns not every begin.
//! Owns: the counts. Never writes anything.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

/// After news of a loss there are none of another for so long.
const QUIET: Duration = Duration::from_secs(60);

#[derive(Default)]
pub struct Loss {
    total: u64,
    /// What the next news of an end will count.
    untold: u64,
    /// The last write failed.
    losing: bool,
    told: Option<Instant>,
    /// The begin was told and the end was not.
    open: bool,
    news: Option<String>,
}

impl Loss {
    pub fn total(&self) -> u64 {
        self.total
    }

    pub fn lost(&mut self, path: &Path, bytes: usize, why: &io::Error) {
        if bytes == 0 {
            return;
        }
        self.total += bytes as u64;
        self.untold += bytes as u64;
        self.losing = true;
        if !self.open && self.told.is_none_or(|at| at.elapsed() >= QUIET) {
            self.news = Some(format!("output for {} is lost: {why}", path.display()));
            self.told = Some(Instant::now());
            self.open = true;
        }
    }

    /// A write has succeeded.
    pub fn over(&mut self, path: &Path) {
        if std::mem::take(&mut self.losing) && std::mem::take(&mut self.open) {
            let bytes = std::mem::take(&mut self.untold);
            let path = path.display();
            let end = format!("output for {path} is written again: {bytes} bytes were lost");
            // Within one look at the stream both may happen.
            self.news = Some(match self.news.take() {
                Some(begin) => format!("{begin}; {end}"),
                None => end,
            });
        }
    }

    /// What has not been told yet.
    pub fn news(&mut self) -> Option<String> {
        self.news.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_does_not_swallow_its_begin() {
        let mut loss = Loss::default();
        let path = Path::new("/l");
        loss.lost(path, 5, &io::Error::from_raw_os_error(28));
        loss.over(path);
        let news = loss.news().unwrap();
        assert!(news.contains("is lost: No space left"), "{news}");
        assert!(news.contains("is written again: 5 bytes"), "{news}");
        assert_eq!(loss.news(), None);
    }

    #[test]
    fn begin_and_end_are_told_once() {
        let mut loss = Loss::default();
        let path = Path::new("/l");
        let full = || io::Error::from_raw_os_error(28);
        loss.over(path);
        assert_eq!(loss.news(), None);
        loss.lost(path, 5, &full());
        assert!(loss.news().unwrap().contains("No space left"));
        loss.lost(path, 6, &full());
        assert_eq!(loss.news(), None);
        loss.over(path);
        assert!(
            loss.news()
                .unwrap()
                .contains("/l is written again: 11 bytes")
        );
        // Full again at once: counted, and told with the next end that is.
        loss.lost(path, 7, &full());
        loss.over(path);
        assert_eq!((loss.news(), loss.total(), loss.untold), (None, 18, 7));
        loss.told = None;
        loss.lost(path, 1, &full());
        assert!(loss.news().is_some());
        loss.over(path);
        assert!(loss.news().unwrap().contains(" 8 bytes"));
    }
}
