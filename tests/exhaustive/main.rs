//! All cases of what the quorum decides, and of how it is settled, against definitions of a few
//! lines: no seeds.
//!
//! A vote sees of the replicas only which of their versions are equal, and who has no vote. So the
//! cases of N replicas are the partitions of those that hold a version, and what the others are:
//! there is nothing else to try. What holds for every case here holds for every disk of so many
//! replicas.

mod answers;
mod cases;
mod settlement;
mod votes;
mod writes;
