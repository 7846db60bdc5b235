// Takes the pictures of the status page that one wants to look at after a change: node pictures.mjs FOLDER [NAME..]
//
// dashboards/status-page.png is saturated.png.

import { join } from "node:path";
import { Stage, until } from "./stage.mjs";

const [folder, ...names] = process.argv.slice(2);
if (!folder) throw new Error("say into which folder");

const seconds = (n) => new Promise((wake) => setTimeout(wake, n * 1000));
const banner = (page) => page.locator("#banner").textContent();

/** Plays one scene and takes its picture. */
async function picture(name, options, play) {
  if (names.length > 0 && !names.includes(name)) return;
  const stage = new Stage();
  try {
    const page = await play(stage, async (server) => {
      const page = await stage.open(options);
      await page.goto(server.page);
      return page;
    });
    await page.screenshot({ path: join(folder, `${name}.png`), fullPage: true });
    console.log(name);
  } finally {
    await stage.end();
  }
}

// Enough at first, then too many.
async function saturated(stage, look) {
  const server = await stage.server("--workers", "128", "--work", "50ms");
  const page = await look(server);
  stage.load(server, "-c", "200", "--rate", "1100");
  await seconds(25);
  const more = stage.load(server, "-c", "500");
  await seconds(12);
  await more.end();
  await seconds(12);
  stage.load(server, "-c", "400");
  await seconds(9);
  await page.hover("#worker-42");
  return page;
}

await picture("saturated", { colorScheme: "light", width: 1280 }, saturated);
await picture("dark", { colorScheme: "dark", width: 1280 }, saturated);
await picture("phone", { colorScheme: "light", width: 390, height: 800 }, async (stage, look) => {
  const server = await stage.server("--workers", "128", "--work", "50ms");
  const page = await look(server);
  stage.load(server, "-c", "100");
  await seconds(20);
  return page;
});
await picture("many", { colorScheme: "light", width: 1280 }, async (stage, look) => {
  const server = await stage.server("--workers", "2000", "--work", "300ms");
  const page = await look(server);
  stage.load(server, "-c", "1500");
  await seconds(15);
  return page;
});
const draining = async (stage, look) => {
  const server = await stage.server("--workers", "6", "--work", "5s", "--drain-timeout", "40s");
  const page = await look(server);
  stage.load(server, "-c", "20");
  await seconds(14);
  server.signal("SIGTERM");
  await until("the drain", async () => (await banner(page)).startsWith("Draining"));
  await seconds(2);
  return [server, page];
};
await picture("draining", { colorScheme: "dark", width: 1280 }, async (stage, look) => (await draining(stage, look))[1]);
await picture("gone", { colorScheme: "light", width: 1280 }, async (stage, look) => {
  const [server, page] = await draining(stage, look);
  await server.end();
  await until("it is gone", async () => (await banner(page)).startsWith("Gone"));
  return page;
});
