// The status page as a browser shows it, over real servers and real clients.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { describe, test } from "node:test";
import { Stage, until } from "./stage.mjs";

const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");

/** A test with a stage of its own. */
function staged(name, play) {
  test(name, { timeout: 100_000 }, async (t) => {
    const stage = new Stage();
    t.after(() => stage.end());
    await play(stage);
  });
}

const text = (page, id) => page.locator(`#${id}`).textContent();
const value = (page, tile) => page.locator(`#tile-${tile} .value`).textContent();
const levels = (page) => page.$$eval("#board .cell", (cells) => cells.map((cell) => Number(cell.dataset.level)));
/** Every word of the page is there, and the second answer too, so that there are rates. */
const drawn = (page) => until("it is drawn", async () => (await value(page, "utilization").catch(() => "–")) !== "–");

/** The next answer has been drawn. */
const drawnAgain = async (page) => {
  const before = await page.evaluate(() => latestStatus.uptime_seconds);
  await until("another answer", () => page.evaluate((at) => latestStatus.uptime_seconds > at, before));
};

staged("a saturated pool is seen as one, and its end too", async (stage) => {
  const server = await stage.server("--workers", "8", "--work", "20ms");
  const page = await stage.open();
  await page.goto(server.page);
  await drawn(page);
  const clients = stage.load(server, "-c", "40");
  // All from one picture. 32 waiting before 8 workers of 20 ms: the oldest has waited for about 80 ms, and an echo takes 100 ms.
  await until("8 of 8 busy and about 32 waiting", () => page.evaluate(() => {
    const tile = (id) => document.querySelector(`#tile-${id} .value`).textContent;
    const [latest, recent] = [points.at(-1), between(answers[0], answers.at(-1))];
    const depth = Number(tile("depth"));
    const cells = [...document.querySelectorAll("#board .cell")].filter((cell) => cell.dataset.level !== "0");
    return tile("busy") === "8 of 8" && depth >= 28 && depth <= 32 && cells.length >= 7
      && /^(9[5-9]|100) %$/.test(tile("utilization"))
      && /^■ The workers are the bottleneck: 8 of 8 are busy, and \d+ wait, the oldest for [\d.]+ m?s\.$/.test(document.getElementById("verdict").textContent)
      && latest.oldest > 0.03 && recent.p50 > 0.05;
  }));
  assert.match(await page.locator("#tile-connections .more").textContent(), /\d queued, \d active, 0 closing/);
  assert.notEqual(await page.locator("#plots path").first().getAttribute("d"), "");
  await clients.end();
  await until("nothing waits", async () => await value(page, "depth") === "0" && await value(page, "busy") === "0 of 8");
  const ages = await page.evaluate(() => points.map((point) => point.oldest));
  assert.ok(ages[0] === 0 && Math.max(...ages) > 0.03 && ages.at(-1) === 0, `the oldest age rose and fell: ${ages}`);
  assert.deepEqual(stage.errors, []);
});

staged("two thousand workers are drawn within a second", async (stage) => {
  const server = await stage.server("--workers", "2000", "--work", "50ms");
  const page = await stage.open();
  // The best of three: the machine may be busy with something else, and is not what is tested.
  let best = Infinity;
  for (let round = 0; round < 3; round += 1) {
    await page.goto(server.page);
    const ms = await page.evaluate(() => new Promise((tell) => {
      const look = () => (document.getElementById("board").children.length === 2000
        ? requestAnimationFrame(() => tell(performance.now())) : requestAnimationFrame(look));
      look();
    }));
    best = Math.min(best, ms);
  }
  assert.ok(best < 1000, `from the navigation to the last cell: ${best} ms`);
  stage.load(server, "-c", "200");
  await until("some are busy", async () => (await levels(page)).some((level) => level > 0));
  assert.deepEqual(stage.errors, []);
});

// These wait for most of their time, and disturb nobody.
describe("beside each other", { concurrency: 4 }, () => {
  staged("it loads without a complaint and asks nobody but its own server", async (stage) => {
    const server = await stage.server("--workers", "3");
    const page = await stage.open();
    const answer = await page.goto(server.page);
    assert.equal(answer.headers()["cache-control"], "no-store");
    assert.match(answer.headers()["content-security-policy"], /^default-src 'none'; connect-src 'self';/);
    await drawn(page);
    assert.equal(await text(page, "server"), "echo");
    assert.equal(await text(page, "phase"), "serving");
    assert.equal(await value(page, "busy"), "0 of 3");
    assert.equal(await page.locator("#banner").isVisible(), false);
    assert.match(await text(page, "verdict"), /not the bottleneck.*nothing waits/);
    assert.deepEqual(stage.errors, []);
    const elsewhere = stage.requests.filter((url) => !url.startsWith(server.page) && !url.startsWith("data:"));
    assert.deepEqual(elsewhere, []);
    const paths = new Set(stage.requests.filter((url) => url.startsWith(server.page)).map((url) => new URL(url).pathname));
    assert.deepEqual([...paths].sort(), ["/", "/status.json"]);
  });

  staged("a drain is announced with the time left, and what is gone is said to be gone", async (stage) => {
    const server = await stage.server("--workers", "2", "--work", "2s", "--lame-duck", "6s", "--drain-timeout", "60s");
    const page = await stage.open();
    await page.goto(server.page);
    await drawn(page);
    const clients = stage.load(server, "-c", "3");
    await until("both are busy", async () => await value(page, "busy") === "2 of 2");
    server.signal("SIGTERM");
    await until("the lame duck", async () => /^Lame duck: .*begins in [0-6] s\.$/.test(await text(page, "banner")));
    await until("the drain", async () => /^Draining: (5\d s|1 m 0 s) left/.test(await text(page, "banner")));
    assert.equal(await text(page, "phase"), "draining");
    await clients.end();
    await until("it is gone", async () => /^Gone: no answer since \d\d:\d\d:\d\d\./.test(await text(page, "banner")));
    assert.ok(await page.locator("body.gone").count() === 1);
    assert.equal((await levels(page)).length, 2, "the last picture stays");
    assert.match(await text(page, "phase"), /^(draining|stopped)$/);
    assert.match(await page.title(), /^✕ millpond echo$/);
    // The browser itself complains of each request that nobody answers.
    const others = stage.errors.filter((error) => !/ERR_CONNECTION_REFUSED|ERR_CONNECTION_RESET|ERR_EMPTY_RESPONSE/.test(error));
    assert.deepEqual(others, []);
  });

  staged("a server that comes back is shown again, from its own start", async (stage) => {
    const first = await stage.server("--workers", "2");
    const page = await stage.open();
    await page.goto(first.page);
    await drawn(page);
    await first.end();
    await until("it is gone", async () => (await text(page, "banner")).startsWith("Gone"));
    const second = await stage.server("--workers", "5", "--metrics", new URL(first.page).host);
    await until("the new one is shown", async () => await value(page, "busy") === "0 of 5");
    assert.equal(await page.locator("#banner").isVisible(), false);
    assert.equal((await levels(page)).length, 5);
    const from = await page.evaluate(() => [...answers, ...points].map((one) => one.uptime_seconds ?? one.at));
    const up = await page.evaluate(() => latestStatus.uptime_seconds);
    assert.ok(from.every((at) => at <= up), `nothing of the first one is left: ${from} at ${up}`);
    // Another one behind the same address, which has been up for longer.
    const mixed = await page.evaluate(() => {
      const other = structuredClone(latestStatus);
      other.started_timestamp_seconds -= 1000;
      other.uptime_seconds += 1000;
      draw(other);
      return [answers.length, points.length];
    });
    assert.deepEqual(mixed, [1, 0]);
    await second.end();
  });

  staged("a worker tells what it does to the pointer and to the keyboard", async (stage) => {
    const server = await stage.server("--workers", "4", "--work", "60s", "--drain-timeout", "1s");
    stage.load(server, "-c", "1", "--size", "300");
    const page = await stage.open();
    await page.goto(server.page);
    const at = await until("one is busy", async () => {
      const number = (await levels(page)).findIndex((level) => level > 0);
      return number < 0 ? null : String(number);
    });
    await page.hover(`#worker-${at}`);
    assert.match(await text(page, "detail"), new RegExp(`^Worker ${at}: busy for [\\d.]+ [um]?s, connection 1 from 127\\.\\d+\\.\\d+\\.\\d+:\\d+, 300 B read in this turn, 1 job so far$`));
    await page.evaluate(() => activate(null));
    await page.locator("#board").dispatchEvent("keydown", { key: "ArrowLeft" });
    assert.deepEqual(stage.errors, [], "a key that leads nowhere, before any worker was chosen");
    await page.focus("#board");
    await page.keyboard.press("Home");
    await page.keyboard.press("ArrowRight");
    await page.keyboard.press("ArrowRight");
    assert.match(await text(page, "detail"), /^Worker 2: /);
    assert.equal(await page.getAttribute("#board", "aria-activedescendant"), "worker-2");
    assert.match(await page.getAttribute("#worker-2", "aria-label"), /^Worker 2: /);
    await page.keyboard.press("End");
    await page.keyboard.press("ArrowRight");
    assert.match(await text(page, "detail"), /^Worker 3: /);
    // The longer at its job, the fuller the cell; from ten seconds on it stands out, and its row says whom it serves.
    await until("its level rises", async () => (await levels(page))[at] >= 4);
    assert.match(await page.locator("#longest tbody tr").first().textContent(), new RegExp(`^${at}[\\d.]+ s1127\\.`));
    await until("it stands out", async () => (await levels(page))[at] === 5);
    assert.match(await text(page, "verdict"), /^▲ The workers are not the bottleneck: 2\d % of their time is used, and nothing waits\. The longest job has run for 1\d\.\d s\.$/);
    // A pointer at rest does not take the keyboard's place, and keys with modifiers are the browser's.
    await page.keyboard.press("Home");
    await page.evaluate(() => { document.getElementById("board").style.marginTop = "40px"; });
    await drawnAgain(page);
    assert.equal(await page.getAttribute("#board", "aria-activedescendant"), "worker-0");
    await page.keyboard.press("Control+End");
    assert.equal(await page.getAttribute("#board", "aria-activedescendant"), "worker-0");
    assert.match(await page.getAttribute("#worker-3", "aria-label"), /^Worker 3: (idle|busy for under 10 ms|busy for longer)$/);
  });

  staged("a hidden page asks nothing, and goes on when it is seen", async (stage) => {
    const server = await stage.server("--workers", "2");
    const page = await stage.open();
    await page.goto(server.page);
    await drawn(page);
    const hide = (hidden) => page.evaluate((now) => {
      Object.defineProperty(document, "hidden", { configurable: true, get: () => now });
      document.dispatchEvent(new Event("visibilitychange"));
    }, hidden);
    await hide(true);
    const before = stage.requests.length;
    await new Promise((wake) => setTimeout(wake, 3_500));
    assert.equal(stage.requests.length, before, "time is the subject here: three and a half seconds without a request");
    await hide(false);
    await until("it asks again", () => stage.requests.length > before + 1);
  });

  staged("without scripts it says so, and where the numbers are", async (stage) => {
    const server = await stage.server("--workers", "2");
    const page = await stage.open({ javaScriptEnabled: false });
    await page.goto(server.page);
    const notice = page.locator("noscript");
    assert.ok(await notice.isVisible());
    assert.match(await notice.textContent(), /scripts are turned off/);
    assert.deepEqual(stage.requests.map((url) => new URL(url).pathname), ["/"]);
  });

  for (const [name, options] of [
    ["light", { colorScheme: "light" }],
    ["dark", { colorScheme: "dark" }],
    ["on a phone", { colorScheme: "light", width: 360, height: 740 }],
  ]) {
    staged(`nothing is out of reach, ${name}`, async (stage) => {
      const server = await stage.server("--workers", "8", "--work", "2s", "--drain-timeout", "60s");
      stage.load(server, "-c", "20");
      const page = await stage.open(options);
      await page.goto(server.page);
      await drawn(page);
      await until("long jobs are listed", () => page.locator("#longest").isVisible());
      const wide = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
      assert.equal(wide, 0, "nothing stands out to the side");
      const look = async () => {
        // Not by a script element, which the page's policy refuses.
        await page.evaluate(AXE);
        const { violations, passes } = await page.evaluate(() => axe.run());
        assert.ok(passes.length > 15, `${passes.length} rules were looked at and kept`);
        return violations.map(({ id, impact, nodes }) => `${id} (${impact}): ${nodes[0].html}`);
      };
      assert.deepEqual(await look(), []);
      server.signal("SIGTERM");
      await until("the drain", async () => (await text(page, "banner")).startsWith("Draining"));
      assert.deepEqual(await look(), []);
      assert.equal(await text(page, "announcement"), "Draining");
      await server.end();
      await until("it is gone", async () => (await text(page, "banner")).startsWith("Gone"));
      assert.deepEqual(await look(), []);
    });
  }

  staged("the verdict is true in the corners", async (stage) => {
    const server = await stage.server("--workers", "10");
    const page = await stage.open();
    await page.goto(server.page);
    await drawn(page);
    const said = (pool, recent) => page.evaluate(([pool, recent]) => {
      const status = structuredClone(latestStatus);
      Object.assign(status.pool, pool);
      return verdict(status, { utilization: 0, refused: 0, seconds: 5, ...recent });
    }, [pool, recent]);
    for (const [pool, recent, level, sentence] of [
      [{ busy: 10, queue_depth: 1, queue_oldest_age_seconds: 0.002 }, { utilization: 0.99 }, "bad", /bottleneck: 10 of 10 are busy, and 1 waits, the oldest for 2\.00 ms\.$/],
      [{ busy: 10, queue_depth: 5, queue_oldest_age_seconds: 2 }, { utilization: 0.3 }, "bad", /are the bottleneck/],
      [{ busy: 0, queue_depth: 1, queue_oldest_age_seconds: 0.000002 }, { utilization: 0.99 }, "warn", /little room/],
      [{ busy: 0, queue_depth: 1, queue_oldest_age_seconds: 95 }, {}, "warn", /^10 of 10 workers are idle, and yet 1 waits, the oldest for 1 m 35 s/],
      [{ busy: 6, queue_depth: 100, queue_oldest_age_seconds: 100, longest_running_seconds: 500 }, { utilization: 0.6 }, "warn", /^4 of 10 workers are idle.*The longest job has run for 8 m 20 s\.$/],
      [{ busy: 1, longest_running_seconds: 12 }, { utilization: 0.008 }, "warn", /not the bottleneck: 0\.8 % .* nothing waits\. The longest job has run for 12\.0 s\.$/],
      [{ busy: 1 }, { refused: 3 }, "bad", /^Clients are turned away: 3 in the last 5\.00 s\. 1 of 10 workers are busy, and nothing waits\.$/],
      [{ busy: 3 }, { utilization: 0.3 }, "calm", /not the bottleneck: 30 % of their time is used, and nothing waits\.$/],
    ]) {
      const [found, words] = await said(pool, recent);
      assert.equal(found, level, words);
      assert.match(words, sentence);
    }
    // After a pause, nothing is said of what was in it.
    const after = await page.evaluate(() => {
      const status = structuredClone(latestStatus);
      status.uptime_seconds += 7200;
      status.connections.rejected_total.limit += 50;
      draw(status);
      return [answers.length, document.querySelector("#tile-echoes .value").textContent, document.getElementById("verdict").textContent];
    });
    assert.deepEqual(after.slice(0, 2), [1, "–"]);
    assert.doesNotMatch(after[2], /turned away/);
    const words = await page.evaluate(() => [0, 0.0009996, 0.9996, 59.96, 3599.99, 90061].map(time));
    assert.deepEqual(words, ["0 s", "1.00 ms", "1.00 s", "1 m 0 s", "1 h 0 m", "1 d 1 h"]);
  });

  test("quantiles are those of Prometheus", async (t) => {
    const stage = new Stage();
    t.after(() => stage.end());
    const server = await stage.server("--workers", "1");
    const page = await stage.open();
    await page.goto(server.page);
    const cases = [
      // Worked out by hand after the documentation of histogram_quantile().
      [0.5, [10, 0, 0], [1, 2], 0.5],
      [0.99, [0, 100, 0], [1, 2], 1.99],
      [0.5, [1, 1, 2], [1, 2], 2],
      [0.9, [1, 1, 2], [1, 2], null],
      [0.5, [0, 0, 0], [1, 2], null],
    ];
    for (const [q, counts, bounds, expected] of cases) {
      const found = await page.evaluate(([q, counts, bounds]) => {
        const answer = quantile(q, counts, bounds);
        return answer === Infinity ? "beyond" : answer;
      }, [q, counts, bounds]);
      if (counts.every((n) => n === 0)) assert.equal(found, null);
      else if (expected === null) assert.equal(found, "beyond");
      else assert.ok(Math.abs(found - expected) < 1e-9, `${q} of ${counts}: ${found}`);
    }
  });
});
