//! Sets of processors and of NUMA nodes, from the kernel's list form to its bit masks. Pure.

use libc::c_ulong;

/// runc's bound: more than any machine has, and few enough for a mask in memory.
const MAX_ID: u32 = 64 * 1024;

const WORD: usize = c_ulong::BITS as usize;

/// A set of small numbers as system calls take it: words of bits, the lowest first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IdSet {
    words: Vec<c_ulong>,
}

impl IdSet {
    /// Parses "0-3,7"; blanks around a range and empty elements are allowed, as in runc.
    ///
    /// # Errors
    /// What is wrong, as text.
    pub fn parse(list: &str) -> Result<Self, String> {
        let number = |text: &str| match text.parse::<u32>() {
            Ok(id) if id > MAX_ID => Err(format!("values larger than {MAX_ID} are not supported")),
            Ok(id) => Ok(id as usize),
            Err(error) => Err(format!("{text:?}: {error}")),
        };
        let mut set = Self::default();
        for range in list.split(',').map(str::trim).filter(|r| !r.is_empty()) {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let (first, last) = (number(first)?, number(last)?);
            if first > last {
                return Err(format!("invalid range: {range}"));
            }
            (first..=last).for_each(|id| set.insert(id));
        }
        if set.words.is_empty() {
            return Err(format!("no members found in set {list:?}"));
        }
        Ok(set)
    }

    fn insert(&mut self, id: usize) {
        if self.words.len() <= id / WORD {
            self.words.resize(id / WORD + 1, 0);
        }
        self.words[id / WORD] |= 1 << (id % WORD);
    }

    pub fn words(&self) -> &[c_ulong] {
        &self.words
    }

    pub fn count(&self) -> u32 {
        self.words.iter().map(|word| word.count_ones()).sum()
    }
}

/// One hexadecimal number.
impl std::fmt::Display for IdSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("0x")?;
        let mut words = self.words.iter().rev().skip_while(|word| **word == 0);
        write!(f, "{:x}", words.next().copied().unwrap_or(0))?;
        words.try_for_each(|word| write!(f, "{word:0width$x}", width = WORD / 4))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_become_masks() {
        let cases: &[(&str, Result<&str, &str>)] = &[
            ("0", Ok("0x1")),
            ("0-2,5", Ok("0x27")),
            (" 1 ,, 3-3,", Ok("0xa")),
            ("64", Ok("0x10000000000000000")),
            ("0-64", Ok("0x1ffffffffffffffff")),
            ("3-1", Err("invalid range: 3-1")),
            ("x", Err("\"x\": invalid digit found in string")),
            ("-1", Err("\"\": cannot parse integer from empty string")),
            (",", Err("no members found in set \",\"")),
            ("65537", Err("values larger than 65536 are not supported")),
            (
                "0-9876543210",
                Err("\"9876543210\": number too large to fit in target type"),
            ),
        ];
        for (list, want) in cases {
            let got = IdSet::parse(list).map(|set| set.to_string());
            let want = want.map(str::to_owned).map_err(str::to_owned);
            assert_eq!(got, want, "{list}");
        }
        assert_eq!(IdSet::parse("0-7,70").unwrap().count(), 9);
    }
}
