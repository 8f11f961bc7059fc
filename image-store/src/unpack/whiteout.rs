//! Owns the meaning of `.wh.` names (OCI image-spec, layer.md "Whiteouts"). Pure.

/// What the last component of an entry's path asks for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Marker<'a> {
    /// Not a whiteout.
    None,
    /// Hide this name of the layers below.
    Hide(&'a [u8]),
    /// Hide everything below the parent directory.
    Opaque,
    /// aufs bookkeeping that old docker versions exported; means nothing.
    Ignore,
    /// A `.wh.` name that no tool writes.
    Invalid,
}

const PREFIX: &[u8] = b".wh.";

/// Reads the last component of an entry's path.
pub(crate) fn parse(name: &[u8]) -> Marker<'_> {
    let Some(rest) = name.strip_prefix(PREFIX) else {
        return Marker::None;
    };
    if let Some(meta) = rest.strip_prefix(PREFIX) {
        return if meta == b".opq" {
            Marker::Opaque
        } else {
            Marker::Ignore
        };
    }
    match rest {
        b"" | b"." | b".." => Marker::Invalid,
        hidden => Marker::Hide(hidden),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_table() {
        for (name, wanted) in [
            (&b"a"[..], Marker::None),
            (b".wh", Marker::None),
            (b"x.wh.y", Marker::None),
            (b".wh.a", Marker::Hide(b"a")),
            (b".wh..a", Marker::Hide(b".a")),
            (b".wh..wh..opq", Marker::Opaque),
            (b".wh..wh.plnk", Marker::Ignore),
            (b".wh..wh.", Marker::Ignore),
            (b".wh.", Marker::Invalid),
            (b".wh..", Marker::Invalid),
            (b".wh...", Marker::Invalid),
        ] {
            assert_eq!(parse(name), wanted, "{}", String::from_utf8_lossy(name));
        }
    }
}
