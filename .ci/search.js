// The site's search, in the place of Fuse: whole words, names first, and of equal hits the one that users more likely want.
// An entry has `title`, `section` and `text`, a `rank`, 0 for guides, little for public names and more for what is inside,
// and maybe in `also` other words for what the page is about.
(() => {
  "use strict";
  const IDLE = new Set("a an and are do does for how i in is it my of on or the to what which with".split(" "));
  const wordsOf = (text) => text.toLowerCase().split(/[^\p{L}\p{N}_]+/u).filter(Boolean);
  const partsOf = (words) => words.flatMap((word) => [word, ...word.split("_")]);

  // How well a word fits words: 1 the same, less its beginning, or a longer word with a plural's ending.
  const fit = (word, words) => {
    let best = 0;
    for (const other of words) {
      if (other === word) return 1;
      if (other === word + "s" || word === other + "s") best = Math.max(best, 0.9);
      else if (word.length > 2 && other.startsWith(word)) best = Math.max(best, 0.6);
    }
    return best;
  };

  class Search {
    constructor(entries) {
      this.entries = entries.map((item) => {
        const name = item.section.toLowerCase();
        return {
          item, name, last: name.split(".").pop(),
          section: partsOf(wordsOf(item.section)), title: partsOf(wordsOf(`${item.title} ${item.also || ""}`)),
          text: [...new Set(wordsOf(item.text))],
        };
      });
    }

    score(entry, word) {
      const page = entry.item.section ? 4 : 30;  // the title counts for the page's first entry
      return Math.max(
        entry.name === word ? 24 : entry.last === word ? 20 : 0,
        12 * fit(word, entry.section), page * fit(word, entry.title), 2 * fit(word, entry.text),
      ) / (1 + entry.item.rank);
    }

    // The entries that have all words, or with `some` any of them, best first.
    hits(words, some = false) {
      const scored = this.entries.map((entry) => [words.map((word) => this.score(entry, word)).filter(Boolean), entry]);
      const enough = scored.filter(([found]) => found.length >= (some ? 1 : Math.max(1, words.length)));
      const named = (entry) => words.length > 1 && words.every((word) => fit(word, entry.section) > 0.8) ? 2 : 1;
      const value = (found, entry) => named(entry) * found.length * found.reduce((sum, score) => sum + score, 0);
      return enough.map(([found, entry]) => [value(found, entry), entry]).sort(([a], [b]) => b - a).map(([, entry]) => entry);
    }

    search(query, { limit }) {
      const words = wordsOf(query).filter((word) => !IDLE.has(word));
      const pieces = words.flatMap((word) => word.split("_")).filter(Boolean);
      const name = query.trim().toLowerCase().replace(/\(\)$/, "");
      const isName = /^\w+(\.\w+)+$/.test(name);  // `Loss.value`, or `G.matmat` of an object
      const attempts = [...(isName ? [[[name]], [words.slice(-1)]] : []), [words], [pieces], [pieces, true]];
      for (const attempt of attempts) {
        const hits = this.hits(...attempt);
        if (hits.length) return hits.slice(0, limit).map((entry) => ({ item: entry.item }));
      }
      return [];
    }
  }
  window.Fuse = Search;
})();
