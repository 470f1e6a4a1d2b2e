//! Sectors with content of their own, so that each shows which write it comes from.

/// Bytes of a sector.
pub const SECTOR: usize = 512;

/// Fills a sector with the number of a write, which is not 0, and its own, again and again.
pub fn fill(bytes: &mut [u8], number: u64, sector: usize) {
    for pair in bytes.chunks_exact_mut(16) {
        pair[..8].copy_from_slice(&number.to_le_bytes());
        pair[8..].copy_from_slice(&(sector as u64).to_le_bytes());
    }
}

/// The number of the write that a sector comes from: 0 if it is full of zeroes. `None` if it comes
/// from several, or from a write to another place.
pub fn number_of(bytes: &[u8], sector: usize) -> Option<u64> {
    static ZEROES: [u8; SECTOR] = [0; SECTOR];
    if bytes == ZEROES {
        return Some(0);
    }
    let number = u64::from_le_bytes(*bytes.first_chunk()?);
    let mut whole = [0; SECTOR];
    fill(&mut whole, number, sector);
    (number != 0 && bytes == whole).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_shows_its_write_and_its_place() {
        let mut bytes = [0; SECTOR];
        assert_eq!(number_of(&bytes, 7), Some(0));
        fill(&mut bytes, 3, 7);
        assert_eq!(number_of(&bytes, 7), Some(3));
        assert_eq!(number_of(&bytes, 8), None);
        bytes[SECTOR - 1] ^= 1;
        assert_eq!(number_of(&bytes, 7), None);
    }
}
